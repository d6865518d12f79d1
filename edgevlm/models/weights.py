"""From the bytes of a checkpoint into a model, a few megabytes at a time.

Tensors are read into the place where they stay, and changed and cast on the way, so that loading takes little more
memory than the loaded model.  Files are read rather than mapped: the pages of a map would count as memory of the
process, too, and a file that shrinks meanwhile would end it.
"""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.module import (
    register_module_buffer_registration_hook,
    register_module_parameter_registration_hook,
)

from edgevlm.core.errors import IntegrityError
from edgevlm.families.family import Family, Placement
from edgevlm.families.tensors import StoredTensor
from edgevlm.models.misfits import check_fit
from edgevlm.models.vlm import Vlm
from edgevlm.shapes.config import DecoderConfig, VlmConfig

logger = logging.getLogger(__name__)

CHUNK_ELEMENTS = 1 << 20
EMBEDDING, HEAD = "embed_tokens.weight", "lm_head.weight"
HEAD_LOST = (
    "the weights hold no head: taking the embedding; if the answers make no sense, the head was lost: "
    "fetch the weights again"
)
TYPES: Mapping[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "U16": torch.uint16,
    "I16": torch.int16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "F32": torch.float32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F64": torch.float64,
}


@dataclass(frozen=True)
class Source:
    """A tensor on disk, and what becomes of it on its way to ``where``."""

    stored: StoredTensor
    where: Placement

    @property
    def rows(self) -> tuple[int, ...]:
        """The shape of what is read: without leading axes of 1, and one part of its rows."""
        shape = self.stored.shape
        while self.where.squeeze and len(shape) > 1 and shape[0] == 1:
            shape = shape[1:]
        total = self.where.part[1]
        return (shape[0] // total, *shape[1:]) if total > 1 and shape and shape[0] % total == 0 else shape

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape in the model."""
        return self.rows[::-1] if self.where.transpose else self.rows

    @property
    def table(self) -> tuple[int, int]:
        """How many rows are read, and the elements of each."""
        return (self.rows[0] if self.rows else 1), math.prod(self.rows[1:])

    @property
    def dtype(self) -> torch.dtype:
        """The type on disk."""
        return TYPES[self.stored.dtype]


def load_weights(
    config: VlmConfig, tensors: Mapping[str, StoredTensor], family: Family, dtype: torch.dtype | None, *, where: str
) -> Vlm:
    """The model of ``config`` with ``tensors`` in it, floating-point ones as ``dtype`` (None: as they are stored).

    Whether the head is the embedding, and how many rows both have, the tensors decide, not ``config``.
    Raises IntegrityError that names what is missing, left over or of another shape, in the checkpoint's words.
    """
    sources, unknown = placed(tensors, family, config, where=where)
    config = settled(config, sources)
    net = empty_model(config)
    check_fit(net, sources, unknown, where=where)
    state = {name: _filled(name, tensor, sources, dtype) for name, tensor in net.state_dict().items()}
    net.load_state_dict(state, assign=True)
    return net


def placed(
    tensors: Mapping[str, StoredTensor], family: Family, config: VlmConfig, *, where: str
) -> tuple[dict[str, Source], list[str]]:
    """The source of each tensor of our model, and the names that ``family`` does not know."""
    sources: dict[str, Source] = {}
    unknown = []
    for stored in tensors.values():
        places = family.place(stored.name, config)
        if places is None:
            unknown.append(stored.name)
            continue
        for place in places:
            if place.name in sources:
                both = f"{sources[place.name].stored.name} and {stored.name}"
                raise IntegrityError(f"{where} holds {both}, which are the same tensor ({place.name}); remove one")
            sources[place.name] = Source(stored, place)
    return sources, unknown


def settled(config: VlmConfig, sources: dict[str, Source]) -> VlmConfig:
    """``config`` with the head and the number of rows that the tensors have; a head like the embedding is dropped.

    Of a tied pair a file may hold the head alone.  Configs are often wrong here: of FastVLM's, some say that the head
    is tied and some that it is not.
    """
    decoder = _with_the_heads_place(config.decoder, sources)
    embedding, head = sources.get(EMBEDDING), sources.get(HEAD)
    rows = embedding.shape[:1] if embedding is not None else ()
    if rows and rows[0] and rows[0] != decoder.vocab_size and (head is None or head.shape[:1] == rows):
        logger.info("the embedding has %d rows, config.json says %d: taking %d", rows[0], decoder.vocab_size, rows[0])
        decoder = replace(decoder, vocab_size=rows[0])
    return replace(config, decoder=decoder)


def _with_the_heads_place(decoder: DecoderConfig, sources: dict[str, Source]) -> DecoderConfig:
    """``decoder`` as the tensors have its head; ``sources`` are left with one tensor of a tied pair."""
    stated, embedding, head = decoder.tie_word_embeddings, sources.get(EMBEDDING), sources.get(HEAD)
    if stated and head is not None and embedding is None:
        sources[EMBEDDING] = replace(head, where=replace(head.where, name=EMBEDDING))
        del sources[HEAD]
    elif head is not None and embedding is not None and equal(embedding, head):
        del sources[HEAD]
    elif head is None and not stated:
        logger.warning("config.json says that the head is not the embedding, but %s", HEAD_LOST)
    elif head is not None and stated:
        logger.info("the weights have a separate head, whatever config.json says")
    return replace(decoder, tie_word_embeddings=HEAD not in sources)


def empty_model(config: VlmConfig) -> Vlm:
    """The model of ``config`` whose weights are shapes without memory; what its modules derive is in place."""
    with _without_memory():
        return Vlm(config)


@contextmanager
def _without_memory() -> Iterator[None]:
    """Let this thread's new parameters and batch norms have no memory.

    Other buffers stay: some are computed by the module and stand in no file.  Statistics of batch norms always do,
    and are folded together with parameters.
    """
    thread = threading.get_ident()

    def parameter(module: nn.Module, name: str, value: nn.Parameter | None) -> nn.Parameter | None:
        if value is None or threading.get_ident() != thread:
            return None
        return nn.Parameter(value.detach().to("meta"), requires_grad=value.requires_grad)

    def buffer(module: nn.Module, name: str, value: Tensor | None) -> Tensor | None:
        is_ours = value is not None and threading.get_ident() == thread and isinstance(module, _BatchNorm)
        return value.to("meta") if is_ours and value is not None else None

    hooks = (
        register_module_parameter_registration_hook(parameter),  # type: ignore[arg-type]  # may return a new one
        register_module_buffer_registration_hook(buffer),  # type: ignore[arg-type]
    )
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _filled(name: str, expected: Tensor, sources: Mapping[str, Source], dtype: torch.dtype | None) -> Tensor:
    """The tensor ``name``; the count of batches, which nothing computes with, is often left out of files."""
    if name not in sources:
        return torch.zeros(expected.shape, dtype=expected.dtype)
    source = sources[name]
    return read(source, dtype if dtype is not None and source.dtype.is_floating_point else source.dtype)


def read(source: Source, dtype: torch.dtype) -> Tensor:
    """The tensor as the model wants it, of type ``dtype``.  Raises IntegrityError when the file ends early."""
    result = torch.empty(source.shape, dtype=dtype)
    table = result.T if source.where.transpose else result.view(source.table)
    start = 0
    for chunk in chunks(source):
        table[start : start + len(chunk)] = chunk
        start += len(chunk)
    return result


def equal(first: Source, second: Source) -> bool:
    """Whether two tensors hold the same numbers, in whatever types; read only as far as they do."""
    if first.shape != second.shape or first.where.transpose or second.where.transpose:
        return False
    pairs = zip(chunks(first), chunks(second), strict=True)
    return all(torch.equal(one.float(), other.float()) for one, other in pairs)


def chunks(source: Source) -> Iterator[Tensor]:
    """The rows of ``source``, flat, a million elements at a time; each chunk is overwritten by the next."""
    num_rows, row = source.table
    if not num_rows * row:
        return
    per_chunk = max(1, CHUNK_ELEMENTS // row)
    buffer = torch.empty((min(per_chunk, num_rows), row), dtype=source.dtype)
    with source.stored.file.open("rb") as stream:
        stream.seek(source.stored.offset + source.where.part[0] * num_rows * row * buffer.element_size())
        for start in range(0, num_rows, per_chunk):
            chunk = buffer[: min(per_chunk, num_rows - start)]
            room: NDArray[np.uint8] = chunk.view(torch.uint8).numpy()
            if stream.readinto(room.data) != room.nbytes:
                raise IntegrityError(f"{source.stored.file} ends within {source.stored.name}; fetch it again")
            yield chunk
