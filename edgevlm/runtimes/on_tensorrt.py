"""TensorRT, or TensorRT-RTX, on an NVIDIA GPU, from engines that `edgevlm build` made on this device.

``trt/`` holds the parts of it: ``api`` knows TensorRT's versions, ``store`` the engines, ``cuda`` the memory,
``engine`` runs one and ``decoder`` keeps the kv cache.  Encoder and decoder of one back end share a stream and a
workspace, since they never run at once.  Proved with fakes that compute on the CPU; not run on hardware yet.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from edgevlm.bundle.manifest import Manifest, PartFile
from edgevlm.bundle.read import Bundle
from edgevlm.core.errors import IntegrityError, UnsupportedError, UsageError
from edgevlm.runtimes.choices import check_threads
from edgevlm.runtimes.encoder_views import encode_views, views_at_once
from edgevlm.runtimes.engines import DecoderEngine, Embedding, Encoder, TextFusion
from edgevlm.runtimes.session import Float, ImageFeatures
from edgevlm.runtimes.trt.api import dotted, load_tensorrt
from edgevlm.runtimes.trt.cuda import CudaDevice, device_index
from edgevlm.runtimes.trt.decoder import TensorRtDecoder
from edgevlm.runtimes.trt.engine import FREE, HostGraph, OpenEngine
from edgevlm.runtimes.trt.store import FoundEngine, find_engine

PIXELS, TOKENS, FUSION_CACHE = "pixel_values", "image_features", "fusion_cache"


class TensorRt:
    """A ``BackEnd`` over the parts of the target tensorrt.

    ``device``: None, cuda or cuda:1; ``threads`` changes nothing, since the host only waits.  Raises UnsupportedError
    for another device, DeviceError without a GPU, MissingLibraryError without tensorrt or cuda-python.  Opening a part
    raises what ``find_engine`` raises, and DoesNotFitError where the device's memory is short.
    """

    target: ClassVar[str] = "tensorrt"

    def __init__(self, *, device: str | None = None, threads: int | None = None) -> None:
        check_threads(threads)
        index = device_index(device)
        self._api = load_tensorrt()
        self._device = CudaDevice(index)
        self._engines: dict[str, dict[str, Any]] = {}

    @property
    def info(self) -> Mapping[str, Any]:
        """``engines``: for every part that was opened, which engine it was and what that was built for."""
        facts = self._device.facts
        return {
            "library": "tensorrt-rtx" if self._api.flavour == "rtx" else "tensorrt",
            "version": self._api.version_text,
            "device": f"cuda:{self._device.index}" if self._device.index else "cuda",
            "device_name": facts.name,
            "compute_capability": dotted(facts.compute_capability),
            "cuda": _cuda_version(facts.runtime_version),
            "cuda_driver": _cuda_version(facts.driver_version),
            "engines": {part: dict(told) for part, told in self._engines.items()},
        }

    def open_encoder(self, bundle: Bundle, part: PartFile) -> Encoder:
        return TensorRtEncoder(self._open(bundle, part)[0], bundle.manifest, part)

    def open_fusion(self, bundle: Bundle, part: PartFile) -> TextFusion:
        return TensorRtFusion(self._open(bundle, part)[0])

    def open_embedding(self, bundle: Bundle, part: PartFile) -> Embedding:
        """Rows are looked up on the host, where they lie in their file; there is no engine for them."""
        raise UnsupportedError(f"{part.file}: the manifest does not say where its rows lie: export the bundle again")

    def open_decoder(self, bundle: Bundle, part: PartFile, embedding: Embedding) -> DecoderEngine:
        engine, in_place = self._open(bundle, part)
        return TensorRtDecoder(engine, bundle.manifest, embedding, in_place=in_place)

    def _open(self, bundle: Bundle, part: PartFile) -> tuple[OpenEngine, bool]:
        """The engine of ``part`` on this device, and whether it writes its kv cache in place."""
        found = find_engine(bundle, part, self._api, self._device.facts.compute_capability)
        self._device.enter()
        with found.buffer() as buffer:
            engine = self._api.deserialize(buffer, host_code=found.entry.key.version_compatible)
        self._engines[part.part] = _told(bundle, found)
        return OpenEngine(self._device, engine, part.part), found.in_place


class TensorRtEncoder:
    """Pixels to features: several views at once where the engine has a profile for them."""

    def __init__(self, engine: OpenEngine, manifest: Manifest, part: PartFile) -> None:
        self._graph, self._fuses = HostGraph(engine), manifest.fusion is not None
        self._outputs = [TOKENS, FUSION_CACHE] if self._fuses else [TOKENS]
        self._num_views = views_at_once(part)  # of one picture, where the graph takes them together
        try:
            self._batches = self._batch_sizes(engine, part)
            sides = tuple(int(manifest.image.get(side, 0)) for side in ("height", "width"))
            if all(sides):  # what does not fit is told now, not with the first picture
                engine.device.enter()
                engine.context({PIXELS: (self._num_views, 3, *sides)})
        except BaseException:
            self.close()
            raise

    def encode(self, pixel_values: Float) -> ImageFeatures:
        if not self._batches:
            return encode_views(pixel_values, self._num_views, self._run, fuses=self._fuses)
        if not len(pixel_values):
            raise UsageError("the vision encoder takes at least one view of a picture, got none")
        tokens, done = [], 0
        while done < len(pixel_values):
            batch = next(size for size in self._batches if size <= len(pixel_values) - done)
            rows = self._run(pixel_values[done : done + batch])[0]
            tokens.append(rows.reshape(1, -1, rows.shape[-1]))
            done += batch
        return ImageFeatures(np.concatenate(tokens, axis=1) if len(tokens) > 1 else tokens[0])

    def close(self) -> None:
        self._graph.close()

    def _batch_sizes(self, engine: OpenEngine, part: PartFile) -> list[int]:
        """How many views the engine takes at once, most first; empty where they make one picture together."""
        for name in (PIXELS, *self._outputs):
            if name not in engine.tensors:
                raise IntegrityError(f"{part.file}: its engine has no {name}: export the bundle and build it again")
        is_free = engine.tensors[PIXELS].shape[0] == FREE
        return sorted({1, *engine.sizes(PIXELS, 0)}, reverse=True) if is_free and not self._fuses else []

    def _run(self, pixel_values: Float) -> list[Float]:
        return self._graph.run({PIXELS: pixel_values}, self._outputs)


class TensorRtFusion:
    """Text rows that have seen the picture."""

    def __init__(self, engine: OpenEngine) -> None:
        self._graph = HostGraph(engine)

    def fuse(self, features: ImageFeatures, inputs_embeds: Float) -> Float:
        if features.fusion_cache is None:
            raise UnsupportedError("this model has no pre-fusion: its text rows go to the decoder as they are")
        feeds = {"inputs_embeds": inputs_embeds, FUSION_CACHE: features.fusion_cache}
        return self._graph.run(feeds, ["fused_embeds"])[0]

    def close(self) -> None:
        self._graph.close()


def _told(bundle: Bundle, found: FoundEngine) -> dict[str, Any]:
    """What a measurement must say about an engine."""
    key = found.entry.key
    return {
        "file": found.path.relative_to(bundle.root).as_posix(),
        "sha256": found.entry.sha256,
        "graph": found.graph,
        "kv_cache": "in place" if found.in_place else "rows",
        "profiles": list(found.entry.profiles),
        "built_for": key.place,
        "workspace_mb": found.entry.workspace_mb,
        "version_compatible": key.version_compatible,
        "hardware_compatible": key.hardware_compatible,
    }


def _cuda_version(number: int) -> str:
    """12060 as "12.6"."""
    return f"{number // 1000}.{number % 1000 // 10}"
