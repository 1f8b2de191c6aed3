"""Compacting in place has no peer of its own: those out of place, which need new memory."""

from __future__ import annotations

from .compact_kv import PEERS as OUT_OF_PLACE

PEERS = {
    name: OUT_OF_PLACE[name] for name in ("kvpress: gather, expanded index", "flat index_select")
}
