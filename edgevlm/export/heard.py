"""What every part of a model is given while it answers questions: the inputs by which its graphs are fitted."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from edgevlm.export.parts import Part
from edgevlm.models.as_session import TorchSession, fusion_shape
from edgevlm.models.checkpoint import Checkpoint
from edgevlm.quant.calibration import MAX_TOKENS, Sample
from edgevlm.runtimes.session import Float, ImageFeatures
from edgevlm.runtimes.vlm import RuntimeVlm

Feeds: TypeAlias = Mapping[str, NDArray[Any]]
Report: TypeAlias = Callable[[int, int], None]  # told (samples done, samples in all) after each


@dataclass(frozen=True, kw_only=True, eq=False)
class Heard:
    """One entry per question: ``sequences`` [1, T, D] of rows that the decoder read, prompt and answer in one.

    ``fused``: what the fusion read, of models that have one.  ``pixels``: views [S, 3, H, W] of pictures, which need no
    question.
    """

    sequences: list[Float] = field(default_factory=list)
    fused: list[Feeds] = field(default_factory=list)
    pixels: Sequence[Float] = ()

    def feeds(self, part: Part) -> list[Feeds]:
        """The inputs of the part's float32 graph, by name; none of the embedding, which computes nothing."""
        if part.name == "vision_encoder":
            first = part.inputs[0].shape[0]
            return [{"pixel_values": views} for one in self.pixels for views in _calls(one, first)]
        if part.name == "fusion":
            return list(self.fused)
        if part.name == "decoder_model_merged":
            empty = _empty_caches(part)
            return [{"inputs_embeds": rows, "write_indices": np.zeros(1, np.int64), **empty} for rows in self.sequences]
        return []


class ListeningSession(TorchSession):
    """The PyTorch model, which keeps what it is given in ``heard``."""

    heard: Heard

    def fuse(self, features: ImageFeatures, inputs_embeds: Float) -> Float:
        """As it is, and noted."""
        assert features.fusion_cache is not None
        self.heard.fused.append({"inputs_embeds": inputs_embeds, "fusion_cache": features.fusion_cache})
        return super().fuse(features, inputs_embeds)

    def _next_logits(self, rows: Tensor) -> Float:
        new, sequences = rows.numpy(), self.heard.sequences
        if self.position == 0:
            sequences.append(np.array(new))
        else:
            sequences[-1] = np.concatenate((sequences[-1], new), axis=1)
        return super()._next_logits(rows)


def listen(
    checkpoint: Checkpoint,
    samples: Sequence[Sample],
    pixels: Sequence[Float],
    report: Report = lambda done, total: None,
) -> Heard:
    """Answer the questions of ``samples`` and keep what the parts were given, beside ``pixels`` of pictures.

    Raises what asking raises.
    """
    session = ListeningSession(checkpoint.model, max_context=checkpoint.max_context or None)
    session.heard = Heard(pixels=pixels)
    config = checkpoint.model.config
    vlm = RuntimeVlm(
        session,
        checkpoint.processor,
        name=checkpoint.name,
        max_context=checkpoint.max_context,
        fusion=fusion_shape(config),
        vocab_size=config.decoder.vocab_size,
    )
    with vlm, torch.inference_mode():
        for done, sample in enumerate(samples, start=1):
            vlm.ask(sample.image, sample.prompt, max_tokens=MAX_TOKENS)
            report(done, len(samples))
    return session.heard


def _calls(views: Float, first: int | str) -> list[Float]:
    """``views`` [S, 3, H, W] as the graph takes them: ``first`` at a time, or any number."""
    size = first if isinstance(first, int) else len(views)
    return [views[start : start + size] for start in range(0, len(views), size)]


def _empty_caches(part: Part) -> Feeds:
    """Past keys and values of no rows."""
    sizes = {"batch_size": 1, "past_sequence": 0}
    shapes = {spec.name: [sizes.get(str(size), size) for size in spec.shape] for spec in part.inputs}
    caches = {name: shape for name, shape in shapes.items() if name.startswith("past_key_values.")}
    return {name: np.zeros([int(size) for size in shape], np.float32) for name, shape in caches.items()}
