"""HTML and SVG elements whose text is escaped unless it was made here."""

from __future__ import annotations

from html import escape

Child = object  # a Markup, or anything whose str() is text to be escaped


class Markup(str):
    """Text that is HTML already and is not escaped again."""

    __slots__ = ()


VOID = frozenset({"img", "meta", "br", "circle", "line", "rect", "polyline", "polygon", "path"})


def element(name: str, /, *children: Child, **attributes: object) -> Markup:
    """``<name …>children</name>``.

    Attribute names lose a trailing ``_`` (``class_``) and turn inner ones into dashes; attributes and
    children that are None are left out.
    """
    written = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(_text(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    if name in VOID and not children:
        return Markup(f"<{name}{written}/>" if name not in ("img", "meta", "br") else f"<{name}{written}>")
    return Markup(f"<{name}{written}>{join(*children)}</{name}>")


def join(*children: Child) -> Markup:
    """Children side by side, text escaped."""
    return Markup(
        "".join(one if isinstance(one, Markup) else escape(_text(one)) for one in children if one is not None)
    )


def _text(value: object) -> str:
    """Numbers short, lone surrogates replaced, the rest as it is."""
    text = f"{value:.6g}" if isinstance(value, float) else str(value)
    return text.encode("utf-8", "replace").decode("utf-8")
