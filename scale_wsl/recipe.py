"""Typed recipes: dataclasses filled from YAML files and from the command line, checked key by key.

What is set where, later lines winning:

1. the defaults of the dataclasses, each of which lives beside the code that it sets up;
2. the YAML files: those named by `extends` first (relative to the file that names them), then the file itself;
3. `section.key=value` on the command line.

An unknown key, a wrong type or a value out of range raises `UserError`, which names the key, where it was set, and what
would be right. This module knows no section by name, and must never import one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import math
import re
import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml

from scale_wsl.errors import UserError

__all__ = ["describe", "load_recipe", "recipe_dict", "recipe_yaml", "section", "setting"]

T = TypeVar("T")
R = TypeVar("R")

_LARGEST_FILE = 1 << 20  # bytes; a recipe is a page of text, so anything larger is a mistake
_DEEPEST_EXTENDS = 16
_LARGEST_INTEGER = (1 << 63) - 1
_COMMAND_LINE = "the command line"


def setting(default: T, help: str, *, choices: tuple[T, ...] | None = None) -> T:
    """A field of a recipe section: its default, one sentence on what it means, and the values allowed (None: any)."""
    return dataclasses.field(default=default, metadata={"help": help, "choices": choices})


def section(cls: type[T]) -> T:
    """A field of a recipe that is a section of its own, all defaults."""
    return dataclasses.field(default_factory=cls)


def load_recipe(cls: type[R], file: str | Path | None = None, overrides: Iterable[str] = ()) -> R:
    """Build a `cls` from its defaults, a YAML file and `section.key=value` overrides.

    Raises:
        UserError: a file cannot be read or is not a mapping, or a key is unknown, of a wrong type or out of range.
    """
    fields = _fields_by_key(cls)
    values: dict[str, tuple[Any, str]] = {}
    if file is not None:
        for key, value in _read_files(Path(file)):
            values[key] = value
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            raise UserError(f"'{override}' on the command line is not of the form section.key=value")
        _known(key, fields, _COMMAND_LINE)
        field_type, _ = fields[key]
        values[key] = (_parse_text(text, field_type), _COMMAND_LINE)

    checked: dict[str, Any] = {}
    for key, (value, origin) in values.items():
        _known(key, fields, origin)
        field_type, field = fields[key]
        value = _coerce(value, field_type, key, origin)
        choices = field.metadata.get("choices")
        if choices and value not in choices:
            allowed = ", ".join(str(choice) for choice in choices)
            raise UserError(f"{key} is {_quoted(value)} in {origin}, but must be one of: {allowed}")
        checked[key] = value
    origins = {key: origin for key, (_, origin) in values.items()}
    return typing.cast(R, _construct(cls, checked, origins, ""))


def recipe_dict(recipe: Any) -> dict[str, Any]:
    """The resolved recipe as flat `{"section.key": value}`, in the order of declaration."""
    flat: dict[str, Any] = {}
    for field in dataclasses.fields(recipe):
        value = getattr(recipe, field.name)
        if dataclasses.is_dataclass(value):
            flat |= {f"{field.name}.{key}": inner for key, inner in recipe_dict(value).items()}
        else:
            flat[field.name] = value
    return flat


def recipe_yaml(recipe: Any) -> str:
    """The resolved recipe as YAML that `load_recipe` reads back to an equal recipe."""

    def plain(value: Any) -> Any:
        if dataclasses.is_dataclass(value):
            return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
        return list(value) if isinstance(value, tuple) else value

    return yaml.safe_dump(plain(recipe), sort_keys=False, allow_unicode=True)


def describe(cls: type[Any], prefix: str = "") -> str:
    """Every key of a recipe with its type, default and meaning, section by section: the text of `--help`.

    `prefix` ("source.", say) goes before the keys, where `cls` is one section by itself.
    """
    lines: list[str] = []
    last_section = None
    for key, (field_type, field) in _fields_by_key(cls, prefix).items():
        name = key.rpartition(".")[0]
        if name != last_section:
            lines.append(f"\n{name or 'recipe'}:")
            last_section = name
        choices = field.metadata.get("choices")
        kind = " | ".join(str(choice) for choice in choices) if choices else _type_name(field_type)
        lines.append(f"  {key}={_shown(field.default)}  ({kind})")
        lines.append(f"      {field.metadata.get('help', '')}")
    return "\n".join(lines).lstrip("\n")


# --- reading -----------------------------------------------------------------------------------------------------


class _StrictLoader(yaml.SafeLoader):
    """Safe YAML in which a key given twice is an error and aliases, which can blow up in memory, are refused."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("aliases (*name) are not supported in recipes")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise yaml.YAMLError(f"the key {key!r} on line {key_node.start_mark.line + 1} is not text")
            if key in seen:
                raise yaml.YAMLError(f"the key '{key}' is given twice, again on line {key_node.start_mark.line + 1}")
            seen.add(key)
        return super().construct_mapping(node, deep)


def _load_yaml(text: str) -> Any:
    """The plain value that a YAML text stands for.

    Raises:
        yaml.YAMLError: for whatever is wrong with it.
    """
    try:
        return yaml.load(text, Loader=_StrictLoader)  # noqa: S506 - a subclass of SafeLoader
    except RecursionError:
        raise yaml.YAMLError("it is nested too deeply") from None
    except (ValueError, LookupError, AttributeError, ArithmeticError) as error:  # SafeLoader's, for `!!int ''` and such
        raise yaml.YAMLError(f"a value is not of the type that it looks like ({error})") from None


def _read_files(file: Path, chain: tuple[Path, ...] = ()) -> Iterable[tuple[str, tuple[Any, str]]]:
    """Yield (key, (value, origin)) of a file, those of the file that it extends first."""
    try:
        resolved = file.resolve()
        if resolved in chain:
            raise UserError(f"{file} extends itself: {' -> '.join(str(path) for path in (*chain, resolved))}")
        if len(chain) >= _DEEPEST_EXTENDS:
            raise UserError(f"{chain[0]} extends more than {_DEEPEST_EXTENDS - 1} recipes, one through another")
        with open(file, encoding="utf-8") as handle:
            text = handle.read(_LARGEST_FILE + 1)
    except UnicodeDecodeError:
        raise UserError(f"cannot read the recipe {file}: it is not UTF-8 text") from None
    except (OSError, ValueError, RuntimeError) as error:  # of resolve: a NUL in the name, links in a circle
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"cannot read the recipe {file}: {reason}") from None
    if len(text) > _LARGEST_FILE:
        raise UserError(f"the recipe {file} is larger than 1 MiB, which no recipe is")
    try:
        content = _load_yaml(text)
    except yaml.YAMLError as error:
        raise UserError(f"the recipe {file} is not valid YAML: {' '.join(str(error).split())}") from None
    if content is None:
        content = {}
    if not isinstance(content, dict):
        raise UserError(f"the recipe {file} must be a mapping of sections, not a {type(content).__name__}")
    parent = content.pop("extends", None)
    if parent is not None:
        if not isinstance(parent, str):
            raise UserError(f"extends in {file} must be the path of one other recipe")
        yield from _read_files(file.parent / parent, (*chain, resolved))
    yield from ((key, (value, str(file))) for key, value in _flatten(content))


def _flatten(content: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for key, value in content.items():
        if isinstance(value, dict) and value:
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


# --- checking ----------------------------------------------------------------------------------------------------


def _fields_by_key(cls: type[Any], prefix: str = "") -> dict[str, tuple[Any, dataclasses.Field[Any]]]:
    hints = typing.get_type_hints(cls)
    keys: dict[str, tuple[Any, dataclasses.Field[Any]]] = {}
    for field in dataclasses.fields(cls):
        if dataclasses.is_dataclass(hints[field.name]):
            keys |= _fields_by_key(hints[field.name], f"{prefix}{field.name}.")
        else:
            keys[prefix + field.name] = (hints[field.name], field)
    return keys


def _known(key: str, fields: Mapping[str, Any], origin: str) -> None:
    if key in fields:
        return
    inside = [name for name in fields if name.startswith(key + ".")]
    if inside:
        raise UserError(f"{key} in {origin} is a section and takes keys such as {inside[0]}, not a value")
    by_last_name = [name for name in fields if name.rpartition(".")[2] == key.rpartition(".")[2]]
    close = by_last_name or difflib.get_close_matches(key, fields, n=1, cutoff=0.5)
    hint = f"; did you mean {close[0]}?" if close else "; --help lists every key"
    raise UserError(f"{origin} sets {key}, which no recipe has{hint}")


def _parse_text(text: str, field_type: Any) -> Any:
    """The value that a text on the command line stands for; text fields take it as it is."""
    if field_type is str:
        return text
    try:
        return _load_yaml(text)
    except yaml.YAMLError:
        return text


def _coerce(value: Any, field_type: Any, key: str, origin: str) -> Any:
    """`value` as `field_type`, accepting only what loses nothing (an int for a float, a list for a tuple)."""
    kind = typing.get_origin(field_type)
    if kind in (types.UnionType, typing.Union):
        options = typing.get_args(field_type)
        if value is None and type(None) in options:
            return None
        for option in options:  # the first that it fits: `int | str` takes 8 and '8' as a number, 'auto' as text
            if option is not type(None):
                with contextlib.suppress(UserError):
                    return _coerce(value, option, key, origin)
        raise UserError(f"{key} is {_quoted(value)} in {origin}, but must be {_type_name(field_type)}")
    if kind is tuple and isinstance(value, list | tuple):
        inner = typing.get_args(field_type)
        if len(inner) == 2 and inner[1] is Ellipsis:
            return tuple(_coerce(item, inner[0], key, origin) for item in value)
        if len(inner) == len(value):
            return tuple(_coerce(item, one, key, origin) for item, one in zip(value, inner, strict=True))
    if field_type is bool and isinstance(value, bool):
        return value
    if field_type is str and isinstance(value, str):
        return value
    number = _number(value)
    if field_type is float and number is not None:
        return float(number)
    if field_type is int and number is not None and number == int(number) and abs(number) <= _LARGEST_INTEGER:
        return int(number)  # 7e9 images, as people write it
    too_large = field_type in (int, float) and isinstance(value, int | float) and abs(value) > _LARGEST_INTEGER
    right = _type_name(field_type) + " of smaller size" * too_large
    raise UserError(f"{key} is {_quoted(value)} in {origin}, but must be {right}")


def _number(value: Any) -> int | float | None:
    """A number that fits a float, or None; text too: YAML 1.1 reads 1e-4 (no dot) as text, and people mean a number."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = float(value) if isinstance(value, str) else value
        return number if math.isfinite(number) else None
    except (ValueError, OverflowError):
        return None


def _quoted(value: Any) -> str:
    """A value as an error message shows it, never longer than a line."""
    try:
        text = repr(value)
    except ValueError:  # Python writes no integer of more than 4,300 digits
        return "a number of thousands of digits"
    return text if len(text) <= 80 else f"{text[:60]}... ({len(text)} characters)"


def _construct(cls: type[Any], values: Mapping[str, Any], origins: Mapping[str, str], prefix: str) -> Any:
    """A `cls` with the values whose keys start with `prefix`; where it refuses them, the message says who set them."""
    hints = typing.get_type_hints(cls)
    arguments = {}
    for field in dataclasses.fields(cls):
        key = prefix + field.name
        if dataclasses.is_dataclass(hints[field.name]):
            arguments[field.name] = _construct(hints[field.name], values, origins, key + ".")
        elif key in values:
            arguments[field.name] = values[key]
    try:
        return cls(**arguments)
    except UserError as error:
        where = _where_set(str(error), {key: origin for key, origin in origins.items() if key.startswith(prefix)})
        raise UserError(f"{error}{where}") from None


def _where_set(message: str, origins: Mapping[str, str]) -> str:
    """' (set in FILE)' for the keys that a message names, by full name or, where it names none so, by the last part."""

    def named(name: str) -> bool:
        return re.search(rf"(?<![\w.-]){re.escape(name)}(?![\w-])", message) is not None

    found = [key for key in origins if named(key)] or [key for key in origins if named(key.rpartition(".")[2])]
    places = {key: f"{'on' if origins[key] == _COMMAND_LINE else 'in'} {origins[key]}" for key in found}
    if len(set(places.values())) > 1:
        return f" ({', '.join(f'{key} set {place}' for key, place in places.items())})"
    return f" (set {places[found[0]]})" if found else ""


# --- showing -----------------------------------------------------------------------------------------------------

_NAMES = {int: "a whole number", float: "a number", str: "text", bool: "true or false", type(None): "null"}


def _type_name(field_type: Any) -> str:
    kind = typing.get_origin(field_type)
    if kind in (types.UnionType, typing.Union):
        return " or ".join(_type_name(option) for option in typing.get_args(field_type))
    if kind is tuple:
        return "a list of " + " and ".join(_type_name(inner) for inner in typing.get_args(field_type) if inner != ...)
    return _NAMES.get(field_type, str(field_type))


def _shown(default: Any) -> str:
    return "''" if default == "" else yaml.safe_dump(default, default_flow_style=True).removesuffix("...\n").strip()
