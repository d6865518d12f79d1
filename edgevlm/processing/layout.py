"""What stands in a prompt for one picture: its placeholders, and the tokens that say which tile is which."""

from __future__ import annotations

from typing import Literal

from edgevlm.processing.picture import Grid

Layout = Literal["plain", "idefics3", "nanovlm"]

GLOBAL = {"idefics3": "<global-img>", "nanovlm": "<|global_image|>"}
FENCE = "<fake_token_around_image>"  # Idefics3's, before each tile and after the last


def layout_tokens(layout: Layout, most: Grid) -> tuple[str, ...]:
    """The control tokens that ``layout`` writes beside the placeholder, for grids up to ``most``."""
    if layout == "plain":
        return ()
    rows, columns = most if most != (1, 1) else (0, 0)
    places = tuple(_place(row, column) for row in range(rows) for column in range(columns))
    return (GLOBAL[layout], *((FENCE,) if layout == "idefics3" else ()), *places)


def num_tiles(layout: Layout, grid: Grid) -> int:
    """How many times the vision tokens of one view stand in the prompt for a picture with ``grid``."""
    cells = grid[0] * grid[1]
    return cells if layout == "plain" or cells == 1 else cells + 1


def picture_text(layout: Layout, grid: Grid, placeholders: str, index: int, num_pictures: int) -> str:
    """The text for the picture ``index`` of ``num_pictures``; ``placeholders`` stand for one view."""
    if layout == "idefics3":
        return _idefics3(grid, placeholders)
    if layout == "nanovlm":
        return (f"<image: {index}>" if num_pictures > 1 else "") + _nanovlm(grid, placeholders)
    return placeholders * num_tiles(layout, grid)


def _idefics3(grid: Grid, placeholders: str) -> str:
    whole = f"{FENCE}{GLOBAL['idefics3']}{placeholders}{FENCE}"
    if grid == (1, 1):
        return whole
    rows = (
        "".join(f"{FENCE}{_place(row, column)}{placeholders}" for column in range(grid[1])) for row in range(grid[0])
    )
    return "".join(f"{row}\n" for row in rows) + "\n" + whole


def _nanovlm(grid: Grid, placeholders: str) -> str:
    whole = f"{GLOBAL['nanovlm']}{placeholders}"
    if grid == (1, 1):
        return whole
    return whole + "".join(
        f"{_place(row, column)}{placeholders}" for row in range(grid[0]) for column in range(grid[1])
    )


def _place(row: int, column: int) -> str:
    return f"<row_{row + 1}_col_{column + 1}>"
