"""Labelled images for training and evaluation: folders, shards, order, augmentation, mixing."""
