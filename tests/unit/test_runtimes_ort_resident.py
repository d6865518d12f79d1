"""A decoder whose row, logits, mask and cache stay bound: memory of its own kind stands in for a GPU's."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, ClassVar
from weakref import WeakValueDictionary

import numpy as np
import onnxruntime
import pytest
from numpy.typing import NDArray

from edgevlm.bundle.read import Bundle, read_bundle
from edgevlm.core.errors import UnsupportedError
from edgevlm.runtimes.embedding_table import EmbeddingTable
from edgevlm.runtimes.engines import DecoderEngine
from edgevlm.runtimes.on_onnxruntime import OnnxRuntime
from edgevlm.runtimes.ort_cache import DeviceMemory
from edgevlm.runtimes.ort_devices import CPU, Device
from edgevlm.runtimes.session import Float
from edgevlm.shipped import find_bundle

ON_HOST, ON_GPU = Device("cpu", CPU), Device("cuda", CPU, index=1)  # the CPU, as if its memory were the second GPU's


class Value:
    """What ``onnxruntime.OrtValue`` is on a GPU: numbers go there whole and come back as copies."""

    held: ClassVar[WeakValueDictionary[int, Value]] = WeakValueDictionary()  # by their addresses

    def __init__(self, numbers: NDArray[Any], index: int) -> None:
        self.numbers: NDArray[Any] = numbers.copy()
        self.index = index
        self.held[self.data_ptr()] = self

    @classmethod
    def ortvalue_from_numpy(cls, numbers: NDArray[Any], memory: str, index: int) -> Value:
        assert memory == "cuda"
        return cls(numbers, index)

    def data_ptr(self) -> int:
        return int(self.numbers.ctypes.data)

    def numpy(self) -> NDArray[Any]:
        copied: NDArray[Any] = self.numbers.copy()
        return copied

    def update_inplace(self, numbers: NDArray[Any]) -> None:
        assert (numbers.size, numbers.dtype) == (self.numbers.size, self.numbers.dtype)
        self.numbers[...] = numbers.reshape(self.numbers.shape)


class Binding(onnxruntime.IOBinding):  # type: ignore[misc, unused-ignore]
    """Tells host and GPU apart: an address that is bound must lie where it is said to, and be large enough."""

    def bind_input(self, name: str, *where: Any) -> None:
        super().bind_input(name, "cpu", 0, *self._checked(*where))

    def bind_output(self, name: str, *where: Any) -> None:
        super().bind_output(name, "cpu", 0, *self._checked(*where))

    def _checked(self, memory: str, index: int, dtype: Any, shape: tuple[int, ...], address: int) -> Any:
        value = Value.held.get(address)
        assert (memory, index) == (("cuda", value.index) if value else ("cpu", 0))
        if value:
            assert value.numbers.dtype == dtype
            assert value.numbers.size >= np.prod(shape)
        return dtype, shape, address


@pytest.fixture(autouse=True)
def _gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnxruntime, "OrtValue", Value)
    monkeypatch.setattr(onnxruntime.InferenceSession, "io_binding", lambda self: Binding(self))


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
    usual = list(answers(decoder(bundle, ON_HOST), width))
    engine = decoder(bundle, ON_GPU)
    num_caches = 2 * bundle.manifest.decoder.num_layers
    assert len(Value.held) == num_caches + len(("row", "logits", "mask"))
    resident = list(answers(engine, width))
    assert len(resident) == len(usual) == 9
    for ours, theirs in zip(resident, usual, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_logits_that_were_given_out_are_the_callers(bundle: Bundle) -> None:
    engine = decoder(bundle, ON_GPU)
    engine.prefill(np.zeros((1, 3, bundle.manifest.decoder.hidden_size), np.float32))
    first = engine.decode(1)
    kept = first.copy()
    engine.decode(2)
    np.testing.assert_array_equal(first, kept)


def test_a_cache_of_rows_is_refused_on_a_device(bundle: Bundle) -> None:
    part = replace(bundle.manifest.part("decoder_model_merged"), cache="rows")
    table = bundle.manifest.part("embed_tokens").table
    assert table is not None
    runtime = OnnxRuntime(threads=1)
    runtime._device = ON_GPU
    with pytest.raises(UnsupportedError, match=r"the device cuda keeps its own: .* leave --device out"):
        runtime.open_decoder(bundle, part, EmbeddingTable(bundle, table))


def test_memory_on_a_device_takes_all_or_the_first_numbers() -> None:
    memory = DeviceMemory(4, np.float32, ON_GPU)
    memory.write(np.arange(4, dtype=np.float32))
    memory.write(np.array([[9.0, 8.0]], np.float32))
    assert memory.read(3).tolist() == [9.0, 8.0, 2.0]
