"""Packages that only some uses need, imported where they are used."""

from __future__ import annotations

import importlib
from typing import Any

from tokenmodels._refuse import refusal


def optional(module: str, *, use: str, extra: str) -> Any:
    """The module, or an error that says what it is needed for and what installs it.

    Args:
        module: its full name.
        use: what is done with it, for the error.
        extra: the extra of tokenkernels that brings it.

    Raises:
        ImportError: it is not installed.

    Example:
        >>> optional("json", use="reading tables", extra="train").loads("[1]")
        [1]
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        allowed = f"with it installed: pip install 'tokenkernels[{extra}]'"
        raise ImportError(refusal(use, f"package {module}", allowed, str(error))) from error
