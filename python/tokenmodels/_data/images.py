"""Labelled images as a map from draws to tensors, read from a folder per class or from shards."""

from __future__ import annotations

import glob
import io
import json
import os
import re
import tarfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor
from torch.utils.data import Dataset

from tokenmodels._data.order import Draw
from tokenmodels._optional import optional
from tokenmodels._refuse import listed, refusal
from tokenmodels._seeds import seeded

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".ppm")
Transform = Callable[[Any], Tensor]


class Images(Dataset[tuple[Tensor, int]], ABC):
    """What folders and shards share: decoding and transforming.

    Attributes:
        transform: Pillow image → tensor; it may draw random numbers, which depend on the draw.
        classes: their names; a label is a place in it. Empty where only numbers are known.
        highest: the highest label.
    """

    transform: Transform
    classes: list[str]
    highest: int

    @abstractmethod
    def __len__(self) -> int:
        """How many images there are."""

    @abstractmethod
    def read(self, index: int) -> tuple[bytes, int, str]:
        """Content of a file, its label, and what it is called."""

    def __getitem__(self, draw: Draw) -> tuple[Tensor, int]:
        content, label, name = self.read(draw.image)
        pillow = optional("PIL.Image", use="reading images", extra="train")
        try:
            image = pillow.open(io.BytesIO(content)).convert("RGB")
        except (OSError, ValueError, SyntaxError) as error:  # Pillow fails in many ways
            got = f"{name}: {error}"
            raise ValueError(refusal("data", "images", "whole image files", got)) from error
        with seeded(draw.seed):
            return self.transform(image), label


class ImageFolder(Images):
    """A folder of a folder per class, whose images may lie at any depth.

    Args:
        root: the folder.
        transform: see `Images`.

    Raises:
        FileNotFoundError: there is no such folder, or it holds no images.
    """

    def __init__(self, root: str | Path, transform: Transform) -> None:
        self.transform = transform
        if not Path(root).is_dir():
            raise FileNotFoundError(refusal("data", "folder", "one that exists", root))
        self.classes = sorted(entry.name for entry in os.scandir(root) if entry.is_dir())
        self.files = [
            (path, label)
            for label, name in enumerate(self.classes)
            for path in sorted(_images_below(os.path.join(root, name)))
        ]
        if not self.files:
            allowed = f"class folders with {', '.join(SUFFIXES)}"
            raise FileNotFoundError(refusal("data", "folder", allowed, root))

        self.highest = max(label for _, label in self.files)

    def __len__(self) -> int:
        return len(self.files)

    def read(self, index: int) -> tuple[bytes, int, str]:
        path, label = self.files[index]
        return Path(path).read_bytes(), label, path


def _images_below(folder: str) -> Iterator[str]:
    for base, _, names in os.walk(folder):
        for name in names:
            if name.lower().endswith(SUFFIXES):
                yield os.path.join(base, name)


class _Member(NamedTuple):
    """Where in which shard an image lies."""

    shard: int
    offset: int
    size: int
    label: int
    key: str


class ImageShards(Images):
    """Tar files as the package webdataset writes them, on this machine.

    A sample is the files of one name up to the first dot: an image, and its class as a number in
    `.cls`, or under "label" in `.json`. Every image is reached by itself, so that shards are
    shuffled, repeated and resumed as folders are. The shards are scanned once at the start.

    Args:
        pattern: a path, with `*` or with a range in braces: `train-{000..146}.tar`; or a folder,
            for all `*.tar` in it.
        transform: see `Images`.

    Raises:
        FileNotFoundError: no file fits.
        ValueError: a file that is no tar file, a sample that lacks an image or a class.
    """

    def __init__(self, pattern: str | Path, transform: Transform) -> None:
        self.transform = transform
        self.classes = []
        self.shards = shard_paths(str(pattern))
        self.members = [
            member for i, path in enumerate(self.shards) for member in _members(i, path)
        ]
        self.highest = max(member.label for member in self.members)

    def __len__(self) -> int:
        return len(self.members)

    def read(self, index: int) -> tuple[bytes, int, str]:
        member = self.members[index]
        path = self.shards[member.shard]
        with open(path, "rb") as file:
            file.seek(member.offset)
            return file.read(member.size), member.label, f"{path}: {member.key}"


def are_shards(source: str | Path) -> bool:
    """Whether a path means shards rather than a folder of classes."""
    return str(source).endswith(".tar") or any(Path(source).glob("*.tar"))


def open_images(source: str | Path, transform: Transform) -> Images:
    """The images of a folder of classes, or of shards."""
    return (ImageShards if are_shards(source) else ImageFolder)(source, transform)


def shard_paths(pattern: str) -> list[str]:
    """The shards that a pattern means, each a file that exists."""
    if "://" in pattern or pattern.startswith("pipe:"):
        allowed = "files of this machine, each image of which can be reached by itself"
        raise ValueError(refusal("data", "shards", allowed, pattern))
    if os.path.isdir(pattern):
        pattern = os.path.join(pattern, "*.tar")
    found = [path for one in _ranges(pattern) for path in sorted(glob.glob(one)) or [one]]
    for path in found:
        if not os.path.isfile(path):
            raise FileNotFoundError(refusal("data", "shards", "files that exist", path))
    return found


def _ranges(pattern: str) -> Iterator[str]:
    """`a-{08..10}` → a-08, a-09, a-10; several ranges in turn."""
    range_ = re.search(r"\{(\d+)\.\.(\d+)\}", pattern)
    if range_ is None:
        yield pattern
        return
    for number in range(int(range_[1]), int(range_[2]) + 1):
        middle = str(number).zfill(len(range_[1]))
        yield from _ranges(pattern[: range_.start()] + middle + pattern[range_.end() :])


def _members(shard: int, path: str) -> list[_Member]:
    """The samples of a shard, in its order."""
    images: dict[str, tuple[int, int]] = {}
    labels: dict[str, int] = {}
    try:
        with tarfile.open(path, "r:") as file:
            for info in file:
                folder, name = os.path.split(info.name)
                key, _, suffix = name.partition(".")
                key, suffix = os.path.join(folder, key), f".{suffix.lower()}"
                if suffix in SUFFIXES:
                    images[key] = (info.offset_data, info.size)
                elif suffix in (".cls", ".json"):
                    opened = file.extractfile(info)
                    labels[key] = _label(suffix, opened.read() if opened else b"", path, key)
    except tarfile.TarError as error:
        raise ValueError(
            refusal("data", "shards", "whole tar files", f"{path}: {error}")
        ) from error
    odd = sorted(set(images) ^ set(labels))
    if odd or not images:
        allowed = "samples of an image and a class"
        got = f"{path}: {listed(odd) if odd else 'no image'}"
        raise ValueError(refusal("data", "shards", allowed, got))
    return [_Member(shard, *images[key], labels[key], key) for key in images]


def _label(suffix: str, content: bytes, path: str, key: str) -> int:
    try:
        return int(content) if suffix == ".cls" else int(json.loads(content)["label"])
    except (ValueError, KeyError, TypeError) as error:
        allowed = "a class as a number in .cls or as label in .json"
        got = f"{path}: {key}{suffix}: {content[:40]!r}"
        raise ValueError(refusal("data", "shards", allowed, got)) from error
