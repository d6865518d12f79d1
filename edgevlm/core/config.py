"""Frozen dataclasses from files: strict where people write, lenient where hubs write."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
import types
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePath
from typing import Annotated, Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from edgevlm.core.errors import ConfigError, InputError
from edgevlm.core.registry import unknown_name

C = TypeVar("C")


def from_recipe(kind: type[C], path: Path) -> C:
    """Read a TOML file that a person wrote: an unknown key is an error."""
    return from_mapping(kind, read_toml(path), strict=True, where=str(path))


def from_mapping(kind: type[C], values: Mapping[str, Any], *, strict: bool, where: str) -> C:
    """Build the dataclass ``kind``, nested dataclasses included.

    Raises ConfigError for a missing or wrongly typed field, and (``strict``) for an unknown one, which is
    ignored otherwise; what the dataclass itself refuses is told with ``where`` in front.
    """
    if not isinstance(values, Mapping):
        raise ConfigError(f"{where}: expected a table for {kind.__name__}, found {shown(values)}")
    fields = {field.name: field for field in dataclasses.fields(cast(Any, kind)) if field.init}
    if strict:
        _refuse_unknown(values, list(fields), where)
    hints = get_type_hints(kind, include_extras=False)
    arguments = {
        name: _convert(hints[name], values[name], strict, f"{where}: {name}") for name in fields if name in values
    }
    missing = [name for name, field in fields.items() if name not in arguments and _is_required(field)]
    if missing:
        raise ConfigError(f"{where}: missing {', '.join(missing)} (needed by {kind.__name__})")
    try:
        return kind(**arguments)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error


def read_toml(path: Path) -> dict[str, Any]:
    """The TOML table in ``path``.  Raises InputError when unreadable, ConfigError when it is not TOML."""
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    try:
        return tomllib.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not valid TOML: {error}") from error


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in ``path``.  Raises InputError when there is none."""
    try:
        value = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise InputError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def read_text(path: Path) -> str:
    """The text in ``path``, without Windows' byte order mark.  Raises InputError when it cannot be read."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text") from error


def to_json(value: object, *, indent: int | None = 2) -> str:
    """A dataclass (or plain data) as JSON with a final newline; ``indent=None`` gives one line.

    Tuples and sets become lists, paths text, NumPy scalars and arrays numbers and lists.  NaN and infinity,
    which JSON does not know, become null.  Raises TypeError for anything else.
    """
    plain = to_plain(value)
    text = json.dumps(plain, indent=indent, ensure_ascii=False, allow_nan=False)
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:  # a file name that is not UTF-8
        text = json.dumps(plain, indent=indent, ensure_ascii=True, allow_nan=False)
    return text + "\n"


def to_plain(value: Any) -> Any:
    """``value`` in the types that JSON knows: dict, list, str, int, float, bool, None."""
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, PurePath):
        return str(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: to_plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): to_plain(item) for key, item in value.items()}
    if isinstance(value, (set, frozenset)):
        return sorted(to_plain(item) for item in value)
    if isinstance(value, Sequence) and not isinstance(value, (bytes, bytearray)):
        return [to_plain(item) for item in value]
    if callable(numbers := getattr(value, "tolist", None)):  # NumPy, which this room does not import
        return to_plain(numbers())
    raise TypeError(f"{type(value).__name__} has no JSON form: {shown(value)}")


def shown(value: object) -> str:
    """``repr``, cut: a message stays one readable line, whatever a file holds."""
    try:
        text = repr(value)
    except (RecursionError, ValueError):  # nested too deep, or a number of more digits than Python writes
        text = f"a {type(value).__name__} too large to write"
    return text if len(text) <= 80 else f"{text[:77]}..."


def _is_required(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _refuse_unknown(names: Iterable[object], known: list[str], where: str) -> None:
    for name in names:
        if name not in known:
            raise ConfigError(f"{where}: " + unknown_name("key", str(name), known))


def _convert(hint: Any, value: Any, strict: bool, where: str) -> Any:
    origin, arguments = get_origin(hint), get_args(hint)
    if hint is Any or hint is object:
        return value
    if hint is None or hint is type(None):
        return _check(type(None), value, where)
    if origin is Annotated:
        return _convert(arguments[0], value, strict, where)
    if origin in (Union, types.UnionType):
        return _convert_union(arguments, value, strict, where)
    if origin is Literal:
        return _convert_literal(arguments, value, where)
    if dataclasses.is_dataclass(hint):
        return from_mapping(cast(type[Any], hint), value, strict=strict, where=where)
    if hint is tuple or origin is tuple:
        return _convert_tuple(arguments or (Any, ...), value, strict, where)
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return _convert_mapping(arguments, value, strict, where)
    if isinstance(origin, type) and issubclass(origin, (Sequence, set, frozenset)):
        items = _convert_tuple((arguments[0], ...), value, strict, where)
        return origin(items) if origin in (list, set, frozenset) else items
    if isinstance(hint, type) and issubclass(hint, PurePath) and isinstance(value, str):
        return hint(value)
    return _check(hint, value, where)


def _convert_union(choices: tuple[Any, ...], value: Any, strict: bool, where: str) -> Any:
    """The first choice that takes ``value``; its own type goes first, so ``float | int`` keeps 3 whole."""
    errors: dict[Any, ConfigError] = {}
    for choice in sorted(choices, key=lambda choice: choice is not type(value)):
        try:
            return _convert(choice, value, strict, where)
        except ConfigError as error:
            errors[choice] = error
    tables = [
        error for choice, error in errors.items() if dataclasses.is_dataclass(choice) and _is_tagged(choice, value)
    ]
    others = [choice for choice in choices if choice is not type(None)]
    if len(others) == 1:
        raise errors[others[0]]
    if isinstance(value, Mapping) and len(tables) == 1:
        raise tables[0]
    raise ConfigError(f"{where} must be {' or '.join(map(_hint_name, others))}; found {shown(value)}")


def _is_tagged(kind: Any, value: Any) -> bool:
    """Whether every tag in ``value`` is one that the dataclass ``kind`` goes by, so that the rest is its affair."""
    hints = get_type_hints(kind) if isinstance(value, Mapping) else {}
    tags = {name: get_args(hint) for name, hint in hints.items() if get_origin(hint) is Literal}
    return all(value[name] in choices for name, choices in tags.items() if name in value)


def _convert_literal(choices: tuple[Any, ...], value: Any, where: str) -> Any:
    if not any(type(value) is type(choice) and value == choice for choice in choices):
        raise ConfigError(f"{where} must be one of {', '.join(map(str, choices))}; found {shown(value)}")
    return value


def _convert_tuple(arguments: tuple[Any, ...], value: Any, strict: bool, where: str) -> tuple[Any, ...]:
    if not isinstance(value, (list, tuple)):
        raise ConfigError(f"{where} must be a list; found {shown(value)}")
    if len(arguments) == 2 and arguments[1] is Ellipsis:
        arguments = (arguments[0],) * len(value)
    if len(arguments) != len(value):
        raise ConfigError(f"{where} must hold {len(arguments)} values; found {len(value)}")
    return tuple(
        _convert(hint, item, strict, f"{where}[{index}]")
        for index, (hint, item) in enumerate(zip(arguments, value, strict=True))
    )


def _convert_mapping(arguments: tuple[Any, ...], value: Any, strict: bool, where: str) -> dict[Any, Any]:
    if not isinstance(value, Mapping):
        raise ConfigError(f"{where} must be a table; found {shown(value)}")
    key_hint, item_hint = arguments
    converted = {}
    for key, item in value.items():
        place = f"{where}: {key if str(key).isprintable() else repr(key)}"
        converted[_convert(key_hint, key, strict, place)] = _convert(item_hint, item, strict, place)
    return converted


def _check(hint: type[Any], value: Any, where: str) -> Any:
    if hint is float and type(value) is int and value.bit_length() < 1024:
        return float(value)
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise ConfigError(f"{where} must be {_hint_name(hint)}; found {shown(value)}")
    return value


def _hint_name(hint: Any) -> str:
    return hint.__name__ if isinstance(hint, type) and get_origin(hint) is None else str(hint)
