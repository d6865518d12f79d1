"""The shipped model in 4 bits loses no more than by llama.cpp's Q4_0, at no more bytes.

Loss is the KL divergence of the next token's distribution from the float model's, teacher-forced along the float
model's own answers to questions about pictures that neither training nor calibration has seen.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from edgevlm.evaluation.suites import EVAL_SEED, scenes_suite
from edgevlm.models.as_session import TorchSession
from edgevlm.models.checkpoint import Checkpoint, load_model
from edgevlm.models.vlm import Vlm
from edgevlm.processing.chat import user_message
from edgevlm.quant.calibration import calibration_samples, importance
from edgevlm.quant.decoder import HEAD, QuantizedDecoder, quantize_decoder, quantized_matrices
from edgevlm.quant.fake import fake_quantized
from edgevlm.quant.rounding import QuantizedWeight, relative_error
from edgevlm.quant.schemes import WeightOnly
from edgevlm.runtimes.clock import StageClock
from edgevlm.runtimes.embedding import CachedEncoder, embed_prompt
from edgevlm.runtimes.image_cache import ImageCache
from edgevlm.runtimes.prompt_rows import prompt_rows
from edgevlm.runtimes.session import Float

NUM_SCENES, PER_SCENE, MOST_TOKENS = 40, 4, 6
Q4_0_BITS, Q8_0_BITS = 4.5, 8.5  # blocks of 32 with a scale in float16


@dataclass(frozen=True, kw_only=True)
class Question:
    """A prompt's rows [1, T, D], and the float model's answer with its log probabilities [tokens, V]."""

    rows: Float
    answer: tuple[int, ...]
    log_probabilities: NDArray[np.float64]


@pytest.fixture(scope="module")
def nano() -> Checkpoint:
    return load_model("nano")


@pytest.fixture(scope="module")
def asked(nano: Checkpoint) -> list[Question]:
    session = TorchSession(nano.model)
    stop = nano.processor.prompt_spec.stop_token_ids
    return [_answered(session, rows, stop) for rows in _prompts(nano, session)]


@pytest.fixture(scope="module")
def calibrated(nano: Checkpoint) -> dict[str, Tensor]:
    return importance(nano, calibration_samples(num=64))


@pytest.fixture(scope="module")
def q4_0(nano: Checkpoint) -> QuantizedDecoder:
    """Q4_0 with a head of 8 bits, as llama.cpp keeps tied ones (there in Q6_K: this one is better and larger)."""
    weights = {
        path: _rounded_as_ggml(weight.detach().numpy(), 8 if path == HEAD else 4)
        for path, weight in quantized_matrices(nano.model)
    }
    return QuantizedDecoder(precision="int4-b32", scheme=WeightOnly(group_size=32), weights=weights)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["int4-b128", "int4-b64", "int4-b64-head8"])
def test_calibrated_4_bits_lose_no_more_than_q4_0_at_no_more_bytes(
    nano: Checkpoint,
    asked: Sequence[Question],
    calibrated: dict[str, Tensor],
    q4_0: QuantizedDecoder,
    precision: str,
) -> None:
    ours = quantize_decoder(nano.model, precision, importance=calibrated)
    assert ours.num_bytes <= _ggml_bytes(nano.model)
    assert _divergence(nano.model, ours, asked) <= _divergence(nano.model, q4_0, asked)


def test_reference_is_rounded_as_the_definition_of_q4_0_says(nano: Checkpoint, q4_0: QuantizedDecoder) -> None:
    path, weight = next(quantized_matrices(nano.model))
    assert relative_error(weight, q4_0.weights[path]) == pytest.approx(0.0073, rel=0.05)
    block = np.zeros((1, 32), np.float32)
    block[0, :3] = (-8.0, 3.4, 7.9)
    rounded = _rounded_as_ggml(block, 4)
    assert rounded.scales.tolist() == [[1.0]]
    assert rounded.codes[0, :4].tolist() == [0, 11, 15, 8]


def _prompts(nano: Checkpoint, session: TorchSession) -> Iterator[Float]:
    """Rows of every question of the suite."""
    suite = scenes_suite(NUM_SCENES, seed=EVAL_SEED, per_scene=PER_SCENE)
    encode = CachedEncoder(session, ImageCache(1))
    for item in suite.items:
        picture = nano.processor.prepare(suite.image(item.image_index))
        prompt = prompt_rows(nano.processor, [user_message(item.question.prompt, num_images=1)], [picture])
        yield embed_prompt(session, prompt, encode, StageClock())


def _answered(session: TorchSession, rows: Float, stop: Collection[int]) -> Question:
    """Up to the stop token: behind it a model says what nobody taught it."""
    session.rewind(0)
    logits, answer = [session.prefill(rows)], list[int]()
    while len(logits) < MOST_TOKENS and int(logits[-1].argmax()) not in stop:
        answer.append(int(logits[-1].argmax()))
        logits.append(session.decode(answer[-1]))
    return Question(rows=rows, answer=tuple(answer), log_probabilities=_log_softmax(np.stack(logits)))


def _divergence(model: Vlm, quantized: QuantizedDecoder, asked: Sequence[Question]) -> float:
    """Mean over all tokens of KL(float model, rounded model), in nats."""
    session = TorchSession(fake_quantized(model, quantized))
    return float(np.concatenate([_divergences(session, question) for question in asked]).mean())


def _divergences(session: TorchSession, question: Question) -> NDArray[np.float64]:
    session.rewind(0)
    logits = [session.prefill(question.rows), *(session.decode(token) for token in question.answer)]
    expected, found = question.log_probabilities, _log_softmax(np.stack(logits))
    divergences: NDArray[np.float64] = (np.exp(expected) * (expected - found)).sum(-1)
    return divergences


def _log_softmax(logits: Float) -> NDArray[np.float64]:
    wide = logits.astype(np.float64)
    shifted = wide - wide.max(-1, keepdims=True)
    normalized: NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return normalized


def _ggml_bytes(model: Vlm) -> float:
    return sum(w.numel() * (Q8_0_BITS if path == HEAD else Q4_0_BITS) / 8 for path, w in quantized_matrices(model))


def _rounded_as_ggml(weight: NDArray[np.float32], bits: int) -> QuantizedWeight:
    """Q4_0 or Q8_0: the code is computed with the exact scale, the value with the one rounded to float16."""
    blocks = weight.reshape(len(weight), -1, 32)
    largest = np.take_along_axis(blocks, np.abs(blocks).argmax(-1)[..., None], axis=-1)
    scales = largest / -8 if bits == 4 else np.abs(largest) / 127
    inverse = np.divide(1, scales, out=np.zeros_like(scales), where=scales != 0)
    codes = np.floor(blocks * inverse + 8.5).clip(0, 15) if bits == 4 else np.rint(blocks * inverse) + 128
    return QuantizedWeight(
        codes=torch.from_numpy(codes.reshape(weight.shape).astype(np.uint8)),
        scales=torch.from_numpy(scales[..., 0].astype(np.float16).astype(np.float32)),
        zero_points=None,
        bits=bits,
        group_size=32,
    )
