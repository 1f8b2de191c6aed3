"""Compacting in place has no peer of its own: those out of place, which need new memory."""

from __future__ import annotations

from .compact_kv import PEERS

__all__ = ["PEERS"]
