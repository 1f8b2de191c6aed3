"""The contracts, one file per op; `load` brings all of them into the registry."""

import importlib
import pkgutil


def load() -> None:
    """Imports every op file, so that OPS is complete."""
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")
