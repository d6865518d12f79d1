"""The blocks that a report is laid out with."""

from __future__ import annotations

import re
from collections.abc import Sequence

from edgevlm.bench.markup import Markup, element

NUMBER = re.compile(r"[-+\d.,e ]*")  # an interval or a dash as well


def tile(what: str, value: str, unit: str, how: str) -> Markup:
    """One large value, what it is and how sure it is."""
    big = element("div", value, element("small", unit) if unit else None, class_="big")
    return element("div", element("div", what, class_="what"), big, element("div", how, class_="how"), class_="tile")


def card(title: str, about: str, *content: object) -> Markup:
    """A titled section with one sentence about it."""
    return element("section", element("h2", title), element("p", about, class_="sub"), *content, class_="card")


def pill(text: str, good: bool) -> Markup:
    """A small coloured mark."""
    return element("span", text, class_=f"pill {'good' if good else 'bad'}")


def words(name: str) -> str:
    """A field's name as a person would write it."""
    return name.replace("_", " ")


def cell(value: object) -> object:
    """A plain value as it stands in a table."""
    if isinstance(value, bool):
        return pill("pass" if value else "fail", value)
    if isinstance(value, float):
        return f"{value:.2e}" if value != 0 and not 1e-3 <= abs(value) < 1e4 else f"{value:.5g}"
    return "-" if value is None else value


def fact_table(facts: Sequence[tuple[str, object]]) -> Markup:
    """Names and values in two columns."""
    rows = [element("tr", element("td", name), element("td", value)) for name, value in facts]
    return element("table", *rows, class_="facts")


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> Markup:
    """Numbers stand right, words left; scrolls sideways where the screen is narrow."""
    sides = [_side([row[i] for row in rows]) for i in range(len(header))]
    head = element("tr", *(element("th", name, class_=side) for name, side in zip(header, sides, strict=True)))
    body = [
        element("tr", *(element("td", cell, class_=side) for cell, side in zip(row, sides, strict=True)))
        for row in rows
    ]
    return element("div", element("table", head, *body), class_="scroll")


def _side(cells: Sequence[object]) -> str | None:
    return "number" if all(NUMBER.fullmatch(str(cell)) for cell in cells) else None
