"""The one form in which everything here refuses what it was given."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def refusal(where: str, argument: str, allowed: str, got: Any) -> str:
    """The text of an error: who refuses which argument, what is allowed, what came."""
    return f"{where}: {argument}: allowed {allowed}, got {got}"


def listed(names: list[str], limit: int = 6) -> str:
    """Some names, and how many more there are."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def require_whole(where: str, argument: str, value: Any, least: int = 1) -> None:
    """Raises unless `value` is an integer from `least` on.

    Raises:
        TypeError: it is no integer.
        ValueError: it is smaller.
    """
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(refusal(where, argument, "an int", repr(value)))
    if value < least:
        raise ValueError(refusal(where, argument, f"at least {least}", value))


def require_number(
    where: str, argument: str, value: Any, test: Callable[[float], bool], allowed: str
) -> None:
    """Raises unless `value` is a number that passes `test`, which `allowed` says in words.

    Raises:
        TypeError: it is no number.
        ValueError: it does not pass.
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(refusal(where, argument, "a number", repr(value)))
    if not test(value):
        raise ValueError(refusal(where, argument, allowed, value))
