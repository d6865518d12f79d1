"""What ``tensorrt/build.json`` says: for which sizes of its inputs every part's engine is to be built."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from edgevlm.bundle.paths import RECIPE_FILE
from edgevlm.bundle.read import Bundle
from edgevlm.core.config import from_mapping, read_json, to_json
from edgevlm.core.errors import ConfigError, InputError, IntegrityError, UnsupportedError
from edgevlm.core.files import write_text

SCHEMA_VERSION = 1
BATCHED_INPUTS = ("pixel_values", "inputs_embeds")  # their first size is the number of pictures or sequences
FIRST_BUCKET = 256  # rows of the smallest kv cache that a decoder of the kind "rows" is given


@dataclass(frozen=True, kw_only=True)
class Profile:
    """One range of sizes that an engine is made for: of every input with free ones the least, usual and largest shape.

    A part without free sizes has profiles without shapes.
    """

    name: str
    shapes: dict[str, tuple[tuple[int, ...], ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.name:
            raise ConfigError("a profile needs a name")
        for name, shapes in self.shapes.items():
            if not _grow(shapes):
                raise ConfigError(
                    f"profile {self.name}: {name} needs its least, usual and largest shape, found {shapes}"
                )

    @property
    def batch(self) -> int:
        """How many pictures or sequences it takes at once, at most; 1 where the part leaves no choice."""
        return max((self.shapes[name][2][0] for name in BATCHED_INPUTS if name in self.shapes), default=1)


@dataclass(frozen=True, kw_only=True)
class PartRecipe:
    """The profiles of one part's engine, the one for single pictures or sequences first."""

    profiles: tuple[Profile, ...]

    def __post_init__(self) -> None:
        names = [profile.name for profile in self.profiles]
        if not names or len(set(names)) < len(names):
            raise ConfigError(f"an engine needs profiles of different names, found {names}")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """The whole of ``tensorrt/build.json``.

    ``max_context``: rows of the kv cache.  ``parts`` by their names; ``in_place`` of the graphs that write their cache
    in place, whose past has ``max_context`` rows in every call.
    """

    schema: int = SCHEMA_VERSION
    max_context: int
    parts: dict[str, PartRecipe]
    in_place: dict[str, PartRecipe] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.schema != SCHEMA_VERSION:
            raise ConfigError(f"schema must be {SCHEMA_VERSION}, found {self.schema}")
        if self.max_context <= 0:
            raise ConfigError(f"max_context must be positive, found {self.max_context}")

    def of(self, part: str, *, in_place: bool = False) -> PartRecipe:
        """The recipe of ``part``.  Raises UnsupportedError, which names the parts that there are."""
        recipes: Mapping[str, PartRecipe] = self.in_place if in_place else self.parts
        if part not in recipes:
            known = ", ".join(recipes) or "no part"
            raise UnsupportedError(f"{RECIPE_FILE} has no {'in-place ' * in_place}engine for {part}; it has {known}")
        return recipes[part]


def past_buckets(max_context: int) -> tuple[int, ...]:
    """How many rows a cache of the kind "rows" may have in a call.

    256, 512, 1024, … and ``max_context``: it grows in few steps, since each is a longer copy.
    """
    sizes, size = list[int](), FIRST_BUCKET
    while size < max_context:
        sizes.append(size)
        size *= 2
    return (*sizes, max_context)


def read_recipe(bundle: Bundle) -> Recipe:
    """How the engines of ``bundle`` are to be built.

    Raises UnsupportedError for a bundle without parts for TensorRT, IntegrityError for a damaged file.
    """
    if "tensorrt" not in bundle.manifest.targets():
        raise UnsupportedError(f"{bundle.manifest.name} holds no parts for tensorrt: export it with --target tensorrt")
    path = bundle.path(RECIPE_FILE)
    try:
        return from_mapping(Recipe, read_json(path), strict=True, where=str(path))
    except (ConfigError, InputError) as error:
        raise IntegrityError(f"{error}: copy or export the bundle again") from error


def write_recipe(root: Path, recipe: Recipe) -> None:
    """Put ``recipe`` into the bundle folder ``root``."""
    path = root / RECIPE_FILE
    path.parent.mkdir(exist_ok=True)
    write_text(path, to_json(recipe, indent=None))


def _grow(shapes: tuple[tuple[int, ...], ...]) -> bool:
    """Whether these are three shapes of one rank, each at least as large as the one before it along every axis."""
    if len(shapes) != 3 or len({len(shape) for shape in shapes}) != 1:
        return False
    return all(0 < least <= usual <= largest for least, usual, largest in zip(*shapes, strict=True))
