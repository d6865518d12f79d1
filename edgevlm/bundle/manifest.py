"""What ``edgevlm.json`` says: which file is which part of the model, and how to feed it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from edgevlm.bundle.paths import check_name
from edgevlm.core.config import from_mapping
from edgevlm.core.errors import ConfigError, IntegrityError, UnsupportedError
from edgevlm.core.registry import unknown_name

SCHEMA_VERSION = 1
PARTS = ("vision_encoder", "embed_tokens", "decoder_model_merged")  # of every bundle
OPTIONAL_PARTS = ("fusion",)  # of models with modality pre-fusion
KNOWN_PARTS = (*PARTS, *OPTIONAL_PARTS)


@dataclass(frozen=True)
class TensorSpec:
    """One input or output of a part; a dimension is a number or the name of a free one (``"batch"``)."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]

    def __post_init__(self) -> None:
        if not self.name or not self.dtype:
            raise ConfigError("a tensor needs a name and a dtype")
        if any((size <= 0) if isinstance(size, int) else not size for size in self.shape):
            raise ConfigError(f"tensor {self.name}: a dimension is a positive number or a name, found {self.shape}")


@dataclass(frozen=True, kw_only=True)
class RowTable:
    """The rows of an embedding as they lie in a file, so that looking one up needs no engine.

    ``file`` holds ``num_rows`` x ``num_columns`` numbers of ``dtype`` (float32, float16), little-endian, from byte
    ``offset`` on.
    """

    file: str
    offset: int
    dtype: str
    num_rows: int
    num_columns: int

    def __post_init__(self) -> None:
        check_name(self.file)
        if self.dtype not in ("float32", "float16"):
            raise ConfigError(f"a row table holds float32 or float16, found {self.dtype!r}")
        if self.offset < 0 or self.num_rows <= 0 or self.num_columns <= 0:
            raise ConfigError(
                f"a row table begins at a byte and has rows and columns, found offset {self.offset}, "
                f"{self.num_rows} x {self.num_columns}"
            )


@dataclass(frozen=True, kw_only=True)
class PartFile:
    """One part of the model, lowered for ``target`` in ``precision``.

    ``file`` and ``extra_files`` (external weights) are relative to the bundle, with forward slashes.  ``cache``, of a
    decoder: "shared", past and present may be one buffer of the whole context, which the graph fills in place;
    "grown", present is past with the new rows behind it, a tensor of its own; "rows", present is the new rows alone,
    which the runtime copies behind the past ones, and ``in_place`` among the files is a graph that spares it that.
    ``table``, of embed_tokens: where its rows lie in one of the files.  ``kept_wide``: nodes of a float16 graph that
    compute in float32, since their values leave float16's range.
    """

    part: str
    target: str
    precision: str
    file: str
    extra_files: tuple[str, ...] = ()
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    cache: Literal["shared", "grown", "rows"] = "shared"
    in_place: str = ""
    table: RowTable | None = None
    kept_wide: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.table is not None and self.table.file not in self.files:
            raise ConfigError(f"the rows of {self.part} lie in {self.table.file}, which is no file of the part")
        if self.in_place and self.in_place not in self.extra_files:
            raise ConfigError(f"{self.in_place} writes the cache of {self.part} in place, but is no file of the part")
        if self.part not in KNOWN_PARTS:
            raise ConfigError(unknown_name("part", self.part, KNOWN_PARTS))
        if not self.target or not self.precision:
            raise ConfigError(f"part {self.part} needs a target and a precision")
        for name in self.files:
            check_name(name)

    @property
    def files(self) -> tuple[str, ...]:
        """Every file of the part, the main one first."""
        return (self.file, *self.extra_files)


@dataclass(frozen=True)
class DecoderShape:
    """What a runtime must know to allocate the decoder's kv cache and logits."""

    num_layers: int
    num_key_value_heads: int
    head_size: int
    hidden_size: int
    vocab_size: int

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value <= 0:
                raise ConfigError(f"{name} must be positive, found {value}")


@dataclass(frozen=True, kw_only=True)
class FusionShape:
    """What a runtime must know of modality pre-fusion, where text rows see the picture before the decoder.

    ``num_layers`` of the fusion; ``skip_token_zero``: token id 0 is left out of it, as the model was trained.
    """

    num_layers: int
    skip_token_zero: bool

    def __post_init__(self) -> None:
        if self.num_layers <= 0:
            raise ConfigError(f"fusion num_layers must be positive, found {self.num_layers}")


@dataclass(frozen=True, kw_only=True)
class ImageSize:
    """One picture size among several: pixels a side, and the vision tokens of such a picture."""

    image_size: int
    num_vision_tokens: int

    def __post_init__(self) -> None:
        if self.image_size <= 0 or self.num_vision_tokens <= 0:
            raise ConfigError(f"an image size has pixels and vision tokens, found {self}")


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The whole of ``edgevlm.json``.

    ``image``, ``prompt`` and ``model`` are the plain mappings of the image and prompt specifications and of the
    config that the graphs were made from (empty in older bundles); ``file_bytes`` is the length of each part's
    files, which ``write_manifest`` fills in.  Where a part stands in several precisions for one target, the first
    is the default.  ``num_vision_tokens`` counts one picture, or one tile of it.  ``image_sizes``: those that one
    encoder serves, where it serves several, the first being that of ``image``.  ``fusion`` and a part ``fusion`` come
    together or not at all.
    """

    schema: int = SCHEMA_VERSION
    name: str
    family: str
    parts: tuple[PartFile, ...]
    image: dict[str, Any]
    prompt: dict[str, Any]
    num_vision_tokens: int
    image_sizes: tuple[ImageSize, ...] = ()
    decoder: DecoderShape
    max_context: int
    fusion: FusionShape | None = None
    model: dict[str, Any] = field(default_factory=dict)
    suite: str = ""
    provenance: dict[str, Any] = field(default_factory=dict)
    file_bytes: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.schema != SCHEMA_VERSION:
            raise ConfigError(f"schema must be {SCHEMA_VERSION}, found {self.schema}")
        if not self.name or not self.family:
            raise ConfigError("a bundle needs a name and a family")
        if self.num_vision_tokens <= 0 or self.max_context <= 0:
            raise ConfigError("num_vision_tokens and max_context must be positive")
        self._check_image_sizes()
        self._check_parts()

    def part(self, name: str, target: str = "onnx", precision: str | None = None) -> PartFile:
        """The part ``name`` for ``target``, in ``precision`` or the default one.

        A precision without its block size ("int4") is the first of that kind ("int4-b128").  Raises
        UnsupportedError, which names what the bundle holds instead.
        """
        if name not in KNOWN_PARTS:
            raise UnsupportedError(unknown_name("part", name, KNOWN_PARTS))
        same = [part for part in self.parts if part.part == name and part.target == target]
        for part in sorted(same, key=lambda part: part.precision != precision):
            if precision in (None, part.precision, part.precision.partition("-b")[0]):
                return part
        if same:
            found = ", ".join(part.precision for part in same)
            raise UnsupportedError(f"{self.name}: {name} for {target} has no precision {precision!r}; it has {found}")
        targets = ", ".join(sorted({part.target for part in self.parts if part.part == name})) or "no such part"
        raise UnsupportedError(f"{self.name}: {name} was not exported for {target!r}; the bundle holds {targets}")

    def at_image_size(self, image_size: int | None) -> Manifest:
        """What a reader of pictures of ``image_size`` pixels a side should go by; None is the default size.

        ``model`` stays that of the default size.  Raises UnsupportedError, which names the sizes that there are.
        """
        own = self.image.get("height")
        if image_size in (None, own):
            return self
        for one in self.image_sizes:
            if one.image_size == image_size:
                side, num = one.image_size, one.num_vision_tokens
                image, prompt = {**self.image, "height": side, "width": side}, {**self.prompt, "num_vision_tokens": num}
                return replace(self, image=image, prompt=prompt, num_vision_tokens=num, image_sizes=())
        sides = ", ".join(str(one.image_size) for one in self.image_sizes) or own
        raise UnsupportedError(f"{self.name}: no pictures of {image_size} pixels a side; it was exported for {sides}")

    def targets(self) -> tuple[str, ...]:
        """Every target that some part was exported for, in the order of the manifest."""
        return tuple(dict.fromkeys(part.target for part in self.parts))

    def files(self) -> tuple[str, ...]:
        """Every file that a part needs, once."""
        return tuple(dict.fromkeys(name for part in self.parts for name in part.files))

    def _check_image_sizes(self) -> None:
        sides = [one.image_size for one in self.image_sizes]
        if len(set(sides)) != len(sides):
            raise ConfigError(f"image_sizes names a size twice: {sides}")
        first, own = self.image_sizes[:1], (self.image.get("height"), self.num_vision_tokens)
        if any((one.image_size, one.num_vision_tokens) != own for one in first):
            raise ConfigError(f"image_sizes begins with {first[0]}, image and num_vision_tokens say {own}")

    def _check_parts(self) -> None:
        found = {part.part for part in self.parts}
        missing = [name for name in PARTS if name not in found]
        if missing:
            raise ConfigError(f"no file for part {', '.join(missing)}")
        if (self.fusion is not None) != ("fusion" in found):
            raise ConfigError(
                "the field fusion and a part fusion belong together; found only the "
                + ("part" if self.fusion is None else "field")
            )
        seen = set()
        for part in self.parts:
            key = (part.part, part.target, part.precision)
            if key in seen:
                raise ConfigError(f"{part.part} for {part.target} in {part.precision} is listed twice")
            seen.add(key)


def parse_manifest(values: Mapping[str, Any], *, where: str) -> Manifest:
    """The manifest in ``values``.

    Raises IntegrityError for a schema that is not ours, and for anything missing, unknown or wrongly typed.
    """
    schema = values.get("schema")
    if type(schema) is not int or schema < 1:
        raise IntegrityError(f"{where}: not the manifest of a bundle (schema is {schema!r}, expected a number)")
    if schema > SCHEMA_VERSION:
        raise IntegrityError(
            f"{where}: written by a newer EdgeVLM (schema {schema}, this one reads {SCHEMA_VERSION}): upgrade"
        )
    try:
        return from_mapping(Manifest, values, strict=True, where=where)
    except ConfigError as error:
        raise IntegrityError(str(error)) from error
