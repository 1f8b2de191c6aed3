"""Random numbers that depend on where they are drawn alone: on a seed, an epoch, a position."""

from __future__ import annotations

import hashlib
import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def mixed(*key: int | str) -> int:
    """A number below 2^63 for a key: the same in every process, unrelated for related keys.

    Example:
        >>> mixed(0, "order", 3)
        8244215730568551301
    """
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Inside, torch (on the CPU), random and NumPy draw from `seed`; afterwards, as if nothing had
    been drawn.

    Example:
        >>> with seeded(7):
        ...     first = torch.rand(3)
        >>> with seeded(7):
        ...     torch.equal(torch.rand(3), first)
        True
    """
    numpy = sys.modules.get("numpy")  # who has not loaded it draws nothing from it
    states = torch.get_rng_state(), random.getstate(), numpy and numpy.random.get_state()
    torch.default_generator.manual_seed(seed)
    random.seed(seed)
    if numpy:
        numpy.random.seed(seed % 2**32)
    try:
        yield
    finally:
        torch.set_rng_state(states[0])
        random.setstate(states[1])
        if numpy:
            numpy.random.set_state(states[2])
