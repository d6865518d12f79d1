"""Names to objects, imported only when asked for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from importlib import import_module
from typing import Any, Generic, TypeVar, cast

from edgevlm.core.errors import UnsupportedError
from edgevlm.core.optional import is_missing, missing_library

T = TypeVar("T")


class Registry(Mapping[str, T], Generic[T]):
    """A read-only mapping of names to ``"module:attribute"`` references.

    ``kind`` is the word that error messages use.  Packages outside this repository add entries through the
    entry-point ``group``; a name of our own wins.  Looking up an unknown name raises UnsupportedError, which
    lists the known ones; so does an entry that names a module which is not there.  A library that the entry
    needs and that is not installed raises MissingLibraryError.
    """

    def __init__(self, kind: str, references: Mapping[str, str], *, group: str | None = None) -> None:
        self.kind, self.group = kind, group
        self._references = dict(references)

    def __getitem__(self, name: str) -> T:
        reference = self._references.get(name) or self._external().get(name)
        if reference is None:
            raise UnsupportedError(unknown_name(self.kind, name, list(self)))
        module, _, attribute = reference.partition(":")
        try:
            return cast(T, getattr(import_module(module), attribute))
        except ModuleNotFoundError as error:
            if is_missing(error):
                raise missing_library(error, module) from error
            raise UnsupportedError(f"{self.kind} {name!r} does not load from {reference!r}: {error}") from error
        except (ImportError, AttributeError) as error:
            if name in self._references:
                raise
            raise UnsupportedError(f"{self.kind} {name!r} of another package does not load: {error}") from error

    def __iter__(self) -> Iterator[str]:
        return iter(sorted({*self._references, *self._external()}))

    def __len__(self) -> int:
        return len(list(iter(self)))

    def __contains__(self, name: object) -> bool:
        return name in self._references or name in self._external()

    def get(self, name: str, default: Any = None) -> Any:
        """The object called ``name``, or ``default`` where there is none."""
        return self[name] if name in self else default  # noqa: SIM401 - this is that `get`

    def _external(self) -> dict[str, str]:
        if self.group is None:
            return {}
        from importlib.metadata import entry_points  # 20 ms that `edgevlm --help` need not pay

        return {point.name: point.value for point in entry_points(group=self.group)}


def unknown_name(kind: str, name: str, known: Sequence[str], *, likeness: float = 0.6) -> str:
    """``no export target named 'onx'; known: gguf, onnx. Did you mean 'onnx'?``

    ``likeness`` (0 to 1) is how alike a name must be to be suggested.
    """
    import difflib

    message = f"no {kind} named {name!r}; known: {', '.join(sorted(known)) or 'none'}."
    spelled = {other.lower(): other for other in known}
    close = difflib.get_close_matches(name.lower(), spelled, n=1, cutoff=likeness)
    return f"{message} Did you mean {spelled[close[0]]!r}?" if close else message
