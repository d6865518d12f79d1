"""Our sampling against transformers' logits processors."""

from __future__ import annotations

import numpy as np
import pytest

from edgevlm.runtimes.sampling import Sampling, distribution, penalize

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

VOCABULARY = 500
OPTIONS = [
    Sampling(temperature=0.7),
    Sampling(temperature=1.0, top_k=20),
    Sampling(temperature=1.3, top_p=0.8),
    Sampling(temperature=0.9, top_k=50, top_p=0.95),
    Sampling(temperature=1.0, top_k=1000, top_p=0.5),
    Sampling(temperature=1.0, top_p=1e-6),
]


def theirs(logits: np.ndarray, options: Sampling) -> np.ndarray:
    """The probabilities that ``generate(do_sample=True)`` draws from."""
    processors = [transformers.TemperatureLogitsWarper(options.temperature)]
    if options.top_k:
        processors.append(transformers.TopKLogitsWarper(options.top_k))
    if options.top_p < 1:
        processors.append(transformers.TopPLogitsWarper(options.top_p))
    scores = torch.from_numpy(logits)[None]
    for processor in processors:
        scores = processor(None, scores)
    return np.asarray(torch.softmax(scores.double(), -1)[0])


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("seed", range(5))
def test_we_draw_from_the_distribution_of_transformers(options: Sampling, seed: int) -> None:
    logits = np.random.default_rng(seed).normal(0, 3, VOCABULARY).astype(np.float32)
    tokens, probabilities = distribution(logits, options)
    ours = np.zeros(VOCABULARY)
    ours[tokens] = probabilities
    assert np.abs(ours - theirs(logits, options)).max() < 1e-6


@pytest.mark.parametrize("penalty", [0.8, 1.2])
def test_the_penalty_is_that_of_transformers(penalty: float) -> None:
    logits = np.random.default_rng(0).normal(0, 3, VOCABULARY).astype(np.float32)
    said = [3, 3, 7, 400]
    processor = transformers.RepetitionPenaltyLogitsProcessor(penalty)
    expected = np.asarray(processor(torch.tensor([said]), torch.from_numpy(logits)[None])[0])
    assert np.allclose(penalize(logits, set(said), penalty), expected, rtol=1e-6)
