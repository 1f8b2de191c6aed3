"""Compacting in place has no peer of its own: the same ones as out of place, which need new memory."""

from __future__ import annotations

from .compact_kv import PEERS

__all__ = ["PEERS"]
