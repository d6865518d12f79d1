"""Single values of files that other projects wrote: anything may stand there, and each refusal reads the same."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from edgevlm.core.config import shown
from edgevlm.core.errors import ConfigError, UnsupportedError
from edgevlm.core.registry import unknown_name

MAX_NAME = 80  # characters of a wrong name that a message repeats


def table(values: Mapping[str, Any], name: str, *, where: str) -> Mapping[str, Any]:
    """The table ``name`` of ``values``.  Raises ConfigError when it is missing or no table."""
    found = values.get(name)
    if not isinstance(found, Mapping):
        raise ConfigError(f"{where}: {name} is {shown(found)}; expected a table")
    return found


def require(values: Mapping[str, Any], expected: Mapping[str, tuple[Any, ...]], *, where: str) -> None:
    """Raise UnsupportedError unless each key has one of its expected values; a missing key counts as None."""
    for name, choices in expected.items():
        if (found := values.get(name)) not in choices:
            known = " or ".join(repr(choice) for choice in choices if choice is not None)
            raise UnsupportedError(f"{where}: {name} is {shown(found)}; expected {known}")


def known_name(kind: str, value: object, known: Collection[str], *, where: str, likeness: float = 0.6) -> str:
    """``value``, which is one of ``known``.  Raises UnsupportedError, which lists them."""
    if isinstance(value, str) and value in known:
        return value
    raise unknown(kind, value, known, where=where, likeness=likeness)


def unknown(
    kind: str, value: object, known: Collection[str], *, where: str, hint: str = "", likeness: float = 0.6
) -> UnsupportedError:
    """The refusal of ``value``, which is none of ``known``; ``hint`` says what else can be done."""
    name = value if isinstance(value, str) else shown(value)
    message = f"{where}: {unknown_name(kind, name[:MAX_NAME], list(known), likeness=likeness)}"
    return UnsupportedError(f"{message} {hint}" if hint else message)
