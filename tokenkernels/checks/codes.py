"""What the ops of vector quantisation refuse alike."""

from __future__ import annotations

from typing import Any

from . import fail, floating, rank

MAX_CODES = 1 << 24
MAX_DIM = 512


def codebooks(op: str, name: str, books: Any, backend: str | None, *ranks: int) -> None:
    """Codebooks (K, D) or (G, K, D) of a floating dtype, none of them empty."""
    floating(op, name, books, backend)
    rank(op, name, books, *ranks)
    if not (
        1 <= books.shape[-1] <= MAX_DIM
        and 1 <= books.shape[-2] <= MAX_CODES
        and books.shape[0] >= 1
    ):
        fail(
            op,
            name,
            f"K of 1 … {MAX_CODES} codes of D = 1 … {MAX_DIM} dimensions",
            f"shape {tuple(books.shape)}",
        )
