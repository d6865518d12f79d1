"""A decoder whose row, logits, mask and cache stay bound: the host's memory stands in for a GPU's."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from edgevlm.bundle.read import Bundle, read_bundle
from edgevlm.runtimes.embedding_table import EmbeddingTable
from edgevlm.runtimes.engines import DecoderEngine
from edgevlm.runtimes.on_onnxruntime import OnnxRuntime
from edgevlm.runtimes.ort_cache import DeviceMemory
from edgevlm.runtimes.ort_devices import CPU, Device
from edgevlm.runtimes.session import Float
from edgevlm.shipped import find_bundle


class Pretended(Device):
    """The CPU, as if its memory lay elsewhere."""

    @property
    def off_host(self) -> bool:
        return True


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    return read_bundle(find_bundle("nano"), check=False)


def decoder(bundle: Bundle, device: Device) -> DecoderEngine:
    runtime = OnnxRuntime(threads=1)
    runtime._device = device
    table = bundle.manifest.part("embed_tokens").table
    assert table is not None
    return runtime.open_decoder(bundle, bundle.manifest.part("decoder_model_merged"), EmbeddingTable(bundle, table))


def answers(engine: DecoderEngine, width: int) -> Iterator[Float]:
    """Logits after a prompt, of six tokens, and of two more after a rewind."""
    prompt = np.random.default_rng(0).normal(size=(1, 7, width)).astype(np.float32)
    yield engine.prefill(prompt)
    for token in (3, 1, 4, 1, 5, 9):
        yield engine.decode(token)
    engine.rewind(9)
    yield engine.prefill(prompt[:, :2])
    yield engine.decode(2)


def test_what_stays_bound_gives_the_same_logits(bundle: Bundle) -> None:
    width = bundle.manifest.decoder.hidden_size
    usual = list(answers(decoder(bundle, Device("cpu", CPU)), width))
    resident = list(answers(decoder(bundle, Pretended("cpu", CPU)), width))
    assert len(resident) == len(usual) == 9
    for ours, theirs in zip(resident, usual, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_logits_that_were_given_out_are_the_callers(bundle: Bundle) -> None:
    engine = decoder(bundle, Pretended("cpu", CPU))
    engine.prefill(np.zeros((1, 3, bundle.manifest.decoder.hidden_size), np.float32))
    first = engine.decode(1)
    kept = first.copy()
    engine.decode(2)
    np.testing.assert_array_equal(first, kept)


def test_memory_on_a_device_takes_all_or_the_first_numbers() -> None:
    memory = DeviceMemory(4, np.float32, Device("cpu", CPU))
    memory.write(np.arange(4, dtype=np.float32))
    memory.write(np.array([[9.0, 8.0]], np.float32))
    assert memory.read(3).tolist() == [9.0, 8.0, 2.0]
