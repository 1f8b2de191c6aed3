"""Nested frozen dataclasses as options: read from TOML or JSON, changed on a command line."""

from __future__ import annotations

import argparse
import json
import re
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from tokenmodels._refuse import refusal

Options = TypeVar("Options")
Table = dict[str, Any]


def read_table(path: str | Path) -> Table:
    """A TOML or JSON file, told by its suffix.

    Raises:
        FileNotFoundError: there is none.
        ValueError: another suffix, or the text is not what the suffix says.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(refusal("config", "file", "a file that exists", path))
    if path.suffix not in (".toml", ".json"):
        raise ValueError(refusal("config", "file", "one that ends in .toml or .json", path))
    text = path.read_text()
    try:
        table = json.loads(text) if path.suffix == ".json" else _toml(text)
    except ValueError as error:  # both kinds of decoding errors are of this kind
        got = f"{path}: {error}"
        raise ValueError(refusal("config", "file", f"whole {path.suffix[1:]}", got)) from error
    if not isinstance(table, dict):
        raise ValueError(refusal("config", "file", "a table of sections", path))
    return table


def _toml(text: str) -> Table:
    try:
        import tomllib
    except ImportError as error:
        got = "TOML, which Python reads from 3.11 on"
        raise ImportError(refusal("config", "file", "JSON here", got)) from error
    return tomllib.loads(text)


def changed(options: Options, table: Mapping[str, Any], *, section: str = "") -> Options:
    """A copy of a dataclass with the values of a table, which may be nested as the class is.

    Args:
        options: what is not in the table stays as it is there.
        table: field names → values; lists are taken for tuples.
        section: for errors, what stands in front of the names.

    Raises:
        ValueError: an unknown field, or a value that the class refuses.
        TypeError: a value of another type than the field's.

    Example:
        >>> from dataclasses import dataclass
        >>> @dataclass(frozen=True)
        ... class Size:
        ...     height: int = 1
        ...     width: int | None = None
        >>> changed(Size(), {"width": 3})
        Size(height=1, width=3)
    """
    kinds, values = _kinds(type(options)), {}
    for name, value in table.items():
        if name not in kinds:
            allowed = f"{section}{{{', '.join(kinds)}}}" if section else ", ".join(kinds)
            raise ValueError(refusal("config", "name", allowed, f"{section}{name}"))
        old = getattr(options, name)
        if is_dataclass(old):
            if not isinstance(value, Mapping):
                raise TypeError(refusal("config", f"{section}{name}", "a section", repr(value)))
            values[name] = changed(old, value, section=f"{section}{name}.")
            continue
        found, values[name] = _converted(kinds[name], value)
        if not found:
            kind = _said(kinds[name])
            raise TypeError(refusal("config", f"{section}{name}", kind, repr(value)))
    return replace(options, **values)  # type: ignore[type-var]


def _kinds(options: type) -> dict[str, Any]:
    hints = typing.get_type_hints(options)
    return {field.name: hints[field.name] for field in fields(options)}


def _converted(kind: Any, value: Any) -> tuple[bool, Any]:
    """Whether a value is of a kind, and the value as that kind has it."""
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        tries = (_converted(one, value) for one in inner)
        return next((tried for tried in tries if tried[0]), (False, None))
    if origin is typing.Literal:
        return value in inner and isinstance(value, str), value
    if origin is tuple:
        if not isinstance(value, list | tuple):
            return False, None
        kinds = (inner[0],) * len(value) if inner[-1] is Ellipsis else inner
        if len(kinds) != len(value):
            return False, None
        items = [_converted(one, x) for one, x in zip(kinds, value, strict=True)]
        return all(found for found, _ in items), tuple(x for _, x in items)
    if kind in (int, float) and isinstance(value, bool):
        return False, None
    if kind is float and isinstance(value, int):
        return True, float(value)
    return isinstance(value, kind), value


def _said(kind: Any) -> str:
    """A kind in words."""
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        return " or ".join(_said(one) for one in inner)
    if origin is typing.Literal:
        return " or ".join(inner)
    if origin is tuple:
        if inner[-1] is Ellipsis:
            return f"a list of {_said(inner[0])}"
        return f"[{', '.join(_said(one) for one in inner)}]"
    return {bool: "true or false", types.NoneType: "null", str: "text"}.get(kind, kind.__name__)


def add_arguments(parser: argparse.ArgumentParser, options: Any) -> None:
    """Adds an option `--section.field` for every field, with the help its class's docstring gives.

    What is given arrives in `given`.
    """
    for name, value, kind, text in _leaves(options):
        shown = f"{text} ({value!r})".replace("%", "%%")
        parser.add_argument(
            f"--{name}",
            dest=f"option {name}",
            metavar=_said(kind).replace("%", "%%"),
            default=argparse.SUPPRESS,
            help=shown,
        )


def _leaves(options: Any, prefix: str = "") -> Iterator[tuple[str, Any, Any, str]]:
    kinds = _kinds(type(options))
    texts = dict(re.findall(r"^ {8}(\w+): (.*(?:\n {12}.*)*)", options.__doc__ or "", re.MULTILINE))
    for name, kind in kinds.items():
        value = getattr(options, name)
        if is_dataclass(value):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value, kind, " ".join(texts.get(name, "").split())


def given(parsed: argparse.Namespace, options: Any) -> Table:
    """The options on the command line, as a nested table.

    Values are JSON where the field is no text: `--model.stages "[2, 1]"`, `--run.seed 3`.

    Raises:
        TypeError: a value of another type than the field's.
    """
    table: Table = {}
    for name, _, kind, _ in _leaves(options):
        text = getattr(parsed, f"option {name}", None)
        if text is None:
            continue
        *sections, last = name.split(".")
        inner = table
        for section in sections:
            inner = inner.setdefault(section, {})
        inner[last] = _from_text(name, kind, text)
    return table


def _from_text(name: str, kind: Any, text: str) -> Any:
    try:
        tries = [_converted(kind, json.loads(text)), _converted(kind, text)]
    except ValueError:
        tries = [_converted(kind, text)]
    for found, value in tries:
        if found:
            return value
    raise TypeError(refusal("config", name, _said(kind), repr(text)))


def merged(one: Mapping[str, Any], other: Mapping[str, Any]) -> Table:
    """Two nested tables as one; where both have a value, the other's.

    Example:
        >>> merged({"a": {"b": 1, "c": 2}}, {"a": {"b": 3}})
        {'a': {'b': 3, 'c': 2}}
    """
    result = dict(one)
    for name, value in other.items():
        old = result.get(name)
        both = isinstance(old, Mapping) and isinstance(value, Mapping)
        result[name] = merged(old, value) if both else value  # type: ignore[arg-type]
    return result


def differences(one: Mapping[str, Any], other: Mapping[str, Any], prefix: str = "") -> Table:
    """Dotted names → (value, other value) of all that differs between two nested tables.

    Example:
        >>> differences({"a": {"b": 1, "c": 2}}, {"a": {"b": 3, "c": 2}})
        {'a.b': (1, 3)}
    """
    found: Table = {}
    for name in {**one, **other}:
        a, b = one.get(name), other.get(name)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            found |= differences(a, b, f"{prefix}{name}.")
        elif a != b:
            found[f"{prefix}{name}"] = (a, b)
    return found
