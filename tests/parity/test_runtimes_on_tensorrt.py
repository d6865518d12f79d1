"""The runtime tensorrt over fakes that compute: ONNX Runtime as the engine, the host's memory as the GPU's.

What is proved is everything around the engine: profiles, addresses, the kv cache and its growth, captured steps, and
that all memory is given back.  The numbers must be those of tensorrt-on-cpu.
"""

from __future__ import annotations

import logging
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from fakes.cuda import FakeCuda, cudaError_t, fake_cuda, install
from fakes.trt import FakeEngine, fake_tensorrt
from numpy.typing import NDArray

from edgevlm.bundle.read import Bundle, read_bundle
from edgevlm.bundle.recipe import PartRecipe, Profile, Recipe, read_recipe, write_recipe
from edgevlm.bundle.write import write_manifest, write_sums
from edgevlm.core.errors import (
    DeviceError,
    DoesNotFitError,
    IntegrityError,
    MissingLibraryError,
    UnsupportedError,
    UsageError,
)
from edgevlm.export.engine_profiles import recipe_of
from edgevlm.export.parts import split
from edgevlm.export.target import Extras, Lowering
from edgevlm.export.to_tensorrt import TensorRtTarget
from edgevlm.models.checkpoint import load_model
from edgevlm.runtimes.composed import ComposedSession
from edgevlm.runtimes.open import open_bundle
from edgevlm.runtimes.session import Float, ImageFeatures
from edgevlm.runtimes.trt.api import MODULES, load_tensorrt
from edgevlm.runtimes.trt.build import BuildOptions, build_engines, plan_build
from edgevlm.runtimes.trt.cuda import MODULES as CUDA_MODULES
from edgevlm.runtimes.trt.decoder import TensorRtDecoder
from edgevlm.runtimes.trt.device import Device
from edgevlm.runtimes.trt.memory import Room
from edgevlm.shipped import HERE, find_bundle

OLD, NEW, RTX = ("10.3.0", "tensorrt"), ("11.4.0.106", "tensorrt"), ("1.7.1.116", "rtx")
KINDS = {"rows": OLD, "in-place": NEW, "rtx": RTX}
EVERY = pytest.mark.parametrize("kind", KINDS)
DECODER = "decoder_model_merged"
CLOSE = {"fp32": 1e-5, "fp16": 0.02}  # largest difference over the largest number
MIB = 1 << 20


@pytest.fixture(scope="module")
def typed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """nano for TensorRT, beside its parts for ONNX."""
    return lowered(tmp_path_factory.mktemp("typed") / "nano.bundle", tuple(CLOSE))


def lowered(root: Path, precisions: tuple[str, ...], max_context: int | None = None) -> Path:
    """A copy of nano at ``root`` with parts for TensorRT as well, its decoder in all ``precisions``."""
    shutil.copytree(find_bundle("nano"), root)
    manifest, target = read_bundle(root).manifest, TensorRtTarget(Lowering())
    manifest = replace(manifest, max_context=max_context or manifest.max_context)
    model = load_model("nano").model
    longer = replace(model.config.decoder, max_position_embeddings=manifest.max_context)
    model.config, model.decoder.config = replace(model.config, decoder=longer), longer
    (root / "tensorrt").mkdir()
    parts = tuple(
        target.lower(part, root, precision, Extras(max_context=manifest.max_context))
        for part in split(model)
        if part.name != "embed_tokens"
        for precision in (precisions if part.name == DECODER else ("fp32",))
    )
    write_recipe(root, recipe_of(parts, manifest.max_context, ()))
    write_manifest(root, replace(manifest, parts=(*manifest.parts, *parts)))
    write_sums(root)
    return root


@pytest.fixture(scope="module")
def rows(typed: Path) -> Float:
    width, generator = read_bundle(typed).manifest.decoder.hidden_size, np.random.default_rng(0)
    return generator.standard_normal((1, 290, width)).astype(np.float32)


def put_library(monkeypatch: pytest.MonkeyPatch, version: str, flavour: str) -> ModuleType:
    module = fake_tensorrt(version, flavour)
    for name in MODULES:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return module


def build(bundle: Bundle, precision: str, batch: int = 1, profiles: tuple[str, ...] = ()) -> None:
    api = load_tensorrt()
    options = BuildOptions(
        encoder_precision="fp32", decoder_precision=precision, batch=batch, profiles=profiles, workspace_mb=64
    )
    device = Device(name="Fake GPU", compute_capability=(8, 7), room=Room())
    build_engines(bundle, plan_build(bundle, options, api, device), options, api)


class Made:
    """A bundle with its engines, on a machine of fakes."""

    def __init__(self, root: Path, cuda: FakeCuda, library: Any) -> None:
        self.root, self.cuda, self.library = root, cuda, library

    @contextmanager
    def session(self, precision: str = "fp32", **wishes: Any) -> Iterator[ComposedSession]:
        wishes |= {"encoder_precision": "fp32", "decoder_precision": precision}
        with open_bundle(self.root, "tensorrt", **wishes) as vlm, vlm.exclusive() as opened:
            assert isinstance(opened, ComposedSession)
            yield opened

    @property
    def num_held(self) -> int:
        return len(self.cuda.device) + len(self.cuda.pinned) + len(self.cuda.handles)


@pytest.fixture
def make(typed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Made]:
    """``make(kind)``: the bundle with engines of one kind, in one precision, on a fake GPU of some memory."""

    def make(
        kind: str,
        precision: str = "fp32",
        *,
        memory_mib: int = 256,
        batch: int = 1,
        profiles: tuple[str, ...] = (),
    ) -> Made:
        root = shutil.copytree(typed, tmp_path / kind)
        library = put_library(monkeypatch, *KINDS[kind])
        cuda = install(monkeypatch, fake_cuda(memory_bytes=memory_mib * MIB))
        build(read_bundle(root), precision, batch, profiles)
        return Made(root, cuda, library)

    return make


@contextmanager
def on_cpu(bundle: Path, precision: str) -> Iterator[Any]:
    wishes = {"encoder_precision": "fp32", "decoder_precision": precision}
    with open_bundle(bundle, "tensorrt-on-cpu", **wishes) as vlm, vlm.exclusive() as opened:
        yield opened


def walk(opened: Any, rows: Float) -> NDArray[np.float32]:
    """Logits of a prompt, of tokens beyond a bucket of 256 rows, and of others behind a part of the prompt."""
    found = [opened.prefill(rows[:, :250])]
    found += [opened.decode(token) for token in range(5, 15)]
    opened.rewind(100)
    found += [opened.decode(7), opened.prefill(rows[:, 250:])]
    opened.rewind(0)
    found.append(opened.prefill(rows[:, :3]))
    found.append(opened.decode(3))
    return np.stack(found)


def decoder_of(session: ComposedSession) -> TensorRtDecoder:
    decoder = session._opened().decoder
    assert isinstance(decoder, TensorRtDecoder)
    return decoder


@EVERY
@pytest.mark.parametrize("precision", CLOSE)
def test_the_logits_are_those_of_the_graph_on_the_cpu(
    make: Callable[..., Made], typed: Path, rows: Float, kind: str, precision: str
) -> None:
    with on_cpu(typed, precision) as opened:
        expected = walk(opened, rows)
    with make(kind, precision).session(precision) as session:
        found = walk(session, rows)
    assert np.abs(found - expected).max() < CLOSE[precision] * np.abs(expected).max()
    assert (found.argmax(-1) == expected.argmax(-1)).all()


@EVERY
def test_a_decoder_with_one_profile_gives_the_same_logits(
    make: Callable[..., Made], typed: Path, rows: Float, kind: str
) -> None:
    with on_cpu(typed, "fp32") as opened:
        expected = walk(opened, rows)
    made = make(kind, profiles=("prefill",))
    with made.session() as session:
        found = walk(session, rows)
    assert np.abs(found - expected).max() < CLOSE["fp32"] * np.abs(expected).max()
    assert made.cuda.misuse == []


@EVERY
def test_an_answer_is_word_for_word_that_of_the_cpu(make: Callable[..., Made], typed: Path, kind: str) -> None:
    made, answers = make(kind), []
    for root, runtime in ((typed, "tensorrt-on-cpu"), (made.root, "tensorrt")):
        wishes = {"encoder_precision": "fp32", "decoder_precision": "fp32"}
        with open_bundle(root, runtime, **wishes) as vlm:
            answers.append(vlm.ask(str(HERE / "demo.png"), "How many objects are there?", max_tokens=12).text)
    assert answers[0] == answers[1] != ""
    assert made.num_held == 0


@EVERY
def test_features_are_those_of_the_cpu_for_any_number_of_views(
    make: Callable[..., Made], typed: Path, kind: str
) -> None:
    pixels = np.random.default_rng(1).standard_normal((7, 3, 128, 128)).astype(np.float32)
    with on_cpu(typed, "fp32") as opened:
        expected = opened.encode(pixels).tokens
    made = make(kind, batch=4)
    with made.session() as session:
        features: ImageFeatures = session.encode(pixels)
        runs = [(context.shapes["pixel_values"][0], context.num_runs) for context in encoder_contexts(made)]
    assert features.tokens.shape == (1, 7 * 16, 256)
    assert np.abs(features.tokens - expected).max() < 1e-4
    assert sorted(runs) == [(1, 1), (2, 1), (4, 1)]  # seven views: four, two and one at once


def encoder_contexts(made: Made) -> list[Any]:
    return [context for context in made.library.fake.contexts if "pixel_values" in context.engine.inputs]


@pytest.mark.parametrize("profiles", [(), ("prefill",)], ids=["two profiles", "prefill alone"])
@pytest.mark.parametrize(("kind", "num_captured"), [("rows", 2), ("in-place", 1)])
def test_a_step_is_captured_once_for_every_bucket(
    make: Callable[..., Made], rows: Float, kind: str, num_captured: int, profiles: tuple[str, ...]
) -> None:
    with make(kind, profiles=profiles).session() as session:
        session.prefill(rows[:, :250])
        step = decoder_of(session).step
        for token in range(20):
            session.decode(token)
        assert step.num_captured == num_captured
        assert step.num_launched == 20 - num_captured  # the first one at a length is enqueued as it is
        session.rewind(10)
        session.prefill(rows[:, :30])
        session.decode(3)
        assert (step.num_captured, step.num_launched) == (num_captured, 21 - num_captured)


@pytest.mark.parametrize("profiles", [(), ("prefill",)], ids=["two profiles", "prefill alone"])
def test_rtx_makes_its_own_graphs(make: Callable[..., Made], rows: Float, profiles: tuple[str, ...]) -> None:
    made = make("rtx", profiles=profiles)
    with made.session() as session:
        session.prefill(rows[:, :5])
        session.decode(3)
        session.decode(4)
        assert made.cuda.calls["cudaStreamBeginCapture"] == 0
    strategies = {int(context.config.cuda_graph_strategy) for context in made.library.fake.contexts}
    assert strategies == {0, 1}  # only the context of single rows captures


@pytest.mark.parametrize("error", ["cudaErrorStreamCaptureUnsupported", "cudaErrorMemoryAllocation"])
def test_a_step_that_cannot_be_captured_runs_all_the_same(
    make: Callable[..., Made], rows: Float, caplog: pytest.LogCaptureFixture, error: str
) -> None:
    made = make("rows")
    with made.session() as session, caplog.at_level(logging.WARNING):
        session.prefill(rows[:, :5])
        expected = [session.decode(token) for token in (3, 4, 5)]
        session.rewind(5)
        made.cuda.fail["cudaGraphInstantiateWithFlags"] = cudaError_t[error]
        decoder_of(session).step.close()
        made.cuda.calls.clear()
        found = [session.decode(token) for token in (3, 4, 5)]
    assert np.array_equal(expected, found)
    assert made.cuda.calls["cudaStreamBeginCapture"] == len(caplog.messages) == 1  # not again with every token
    assert "without CUDA graphs" in caplog.text


@pytest.mark.parametrize("kind", ["rows", "in-place"])
def test_a_step_is_little_work_for_the_host(make: Callable[..., Made], rows: Float, kind: str) -> None:
    made = make(kind)
    with made.session() as session:
        session.prefill(rows[:, :5])
        for token in range(3):
            session.decode(token)
        made.cuda.calls.clear()
        session.decode(3)
        calls = {"cudaSetDevice": 1, "cudaGraphLaunch": 1, "cudaStreamSynchronize": 1}
        assert dict(made.cuda.calls) == calls | ({"cudaMemcpy2DAsync": 1} if kind == "rows" else {})


def test_a_prompt_longer_than_a_profile_goes_in_portions(
    typed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: Float
) -> None:
    root = shutil.copytree(typed, tmp_path / "short")
    write_recipe(root, _shorter(read_recipe(read_bundle(root)), 64))
    write_sums(root)
    put_library(monkeypatch, *OLD)
    made = Made(root, install(monkeypatch, fake_cuda()), None)
    build(read_bundle(root), "fp32")
    with on_cpu(typed, "fp32") as opened, made.session() as session:
        for count in (290, 65, 128, 1):
            expected, found = opened.prefill(rows[:, :count]), session.prefill(rows[:, :count])
            assert np.abs(found - expected).max() < 1e-4
            assert session.position == count
            opened.rewind(0)
            session.rewind(0)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["rows", "in-place"])
def test_a_prompt_longer_than_every_profile_of_a_shipped_recipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    root = lowered(tmp_path / "long", ("fp32",), max_context=4096)
    put_library(monkeypatch, *KINDS[kind])
    made = Made(root, install(monkeypatch, fake_cuda()), None)
    build(read_bundle(root), "fp32")
    width = read_bundle(root).manifest.decoder.hidden_size
    prompt = np.random.default_rng(2).standard_normal((1, 2500, width)).astype(np.float32)
    with on_cpu(root, "fp32") as opened, made.session() as session:
        assert decoder_of(session)._chunk_rows == 1024
        found = [np.stack([one.prefill(prompt), one.decode(3), one.decode(4)]) for one in (opened, session)]
        assert session.position == 2502
    assert np.abs(found[1] - found[0]).max() < CLOSE["fp32"] * np.abs(found[0]).max()
    assert made.num_held == 0


def _shorter(recipe: Recipe, longest: int) -> Recipe:
    def cut(profile: Profile) -> Profile:
        shapes = dict(profile.shapes)
        for name, spans in shapes.items():
            if name == "inputs_embeds":
                shapes[name] = tuple((batch, min(count, longest), width) for batch, count, width in spans)
        return replace(profile, shapes=shapes)

    part = recipe.parts[DECODER]
    cut_part = PartRecipe(profiles=tuple(map(cut, part.profiles)))
    return replace(recipe, parts={**recipe.parts, DECODER: cut_part})


@EVERY
def test_everything_is_given_back(make: Callable[..., Made], rows: Float, kind: str) -> None:
    made = make(kind)
    with made.session() as session:
        session.encode(np.zeros((1, 3, 128, 128), np.float32))
        walk(session, rows)
        assert made.num_held > 0
    assert made.num_held == 0
    assert made.cuda.misuse == []
    session.close()
    with pytest.raises(UsageError, match="this session is closed"):
        session.decode(3)


@pytest.mark.parametrize("kind", ["rows", "in-place"])
def test_closed_parts_say_so_and_close_twice(make: Callable[..., Made], rows: Float, kind: str) -> None:
    made = make(kind)
    with made.session() as session:
        engines = session._opened()
        engines.close()
        engines.close()
        pixels = np.zeros((1, 3, 128, 128), np.float32)
        for call in (
            lambda: engines.decoder.decode(3),
            lambda: engines.decoder.prefill(rows),
            lambda: engines.decoder.rewind(0),
            lambda: engines.encoder.encode(pixels),
        ):
            with pytest.raises(UsageError, match="this session is closed"):
                call()
    assert made.num_held == 0


def test_a_position_that_an_engine_reads_on_the_host_is_never_captured(
    make: Callable[..., Made], typed: Path, rows: Float, monkeypatch: pytest.MonkeyPatch
) -> None:
    def location(engine: Any, name: str) -> Any:
        return engine.module.TensorLocation(int(name == "write_indices"))

    monkeypatch.setattr(FakeEngine, "get_tensor_location", location)
    made = make("rows")
    with on_cpu(typed, "fp32") as opened, made.session() as session:
        assert np.abs(walk(session, rows) - walk(opened, rows)).max() < 1e-4
    assert made.cuda.calls["cudaGraphLaunch"] == 0


def test_encoder_and_decoder_share_one_stream_and_one_workspace(make: Callable[..., Made], rows: Float) -> None:
    made = make("in-place")
    with made.session() as session:
        session.encode(np.zeros((1, 3, 128, 128), np.float32))
        session.prefill(rows[:, :5])
        session.decode(3)
        contexts = made.library.fake.contexts
        assert made.cuda.calls["cudaStreamCreateWithFlags"] == 1
        assert len({context.memory for context in contexts}) == 1 < len(contexts)


@pytest.mark.parametrize("kind", ["rows", "in-place"])
def test_what_does_not_fit_is_told_when_it_is_opened(make: Callable[..., Made], kind: str) -> None:
    made = make(kind, memory_mib=1)
    with pytest.raises(DoesNotFitError, match=r"not enough GPU memory .*take a smaller model"), made.session():
        pass
    made.cuda.memory_bytes = 256 * MIB
    with made.session() as session:
        assert session.position == 0
    assert made.num_held == 0


def test_a_cache_that_cannot_grow_stays_as_it_was(make: Callable[..., Made], rows: Float) -> None:
    made = make("rows")
    with made.session() as session:
        session.prefill(rows[:, :250])
        before = session.decode(3)
        session.rewind(250)
        room, made.cuda.memory_bytes = made.cuda.memory_bytes, made.cuda.used_bytes
        with pytest.raises(DoesNotFitError, match=r"kv cache.*not enough GPU memory"):
            session.prefill(rows[:, 250:])
        assert session.position == 250
        made.cuda.memory_bytes = room
        assert np.allclose(session.decode(3), before, atol=1e-5)
    assert made.num_held == 0


@EVERY
@pytest.mark.parametrize("failing", ["cudaStreamSynchronize", "cudaMemcpyAsync"])
def test_an_error_leaves_the_position_as_it_was(
    make: Callable[..., Made], rows: Float, kind: str, failing: str
) -> None:
    made = make(kind)
    with made.session() as session:
        session.prefill(rows[:, :20])
        expected = session.decode(3)
        session.rewind(20)
        made.cuda.fail[failing] = cudaError_t.cudaErrorLaunchFailure
        with pytest.raises(DeviceError, match=f"CUDA failed in {failing}"):
            session.prefill(rows[:, 20:40])
        assert session.position == 20
        del made.cuda.fail[failing]
        assert np.allclose(session.decode(3), expected, atol=1e-5)
    assert made.num_held == 0


@EVERY
def test_ctrl_c_leaves_the_position_as_it_was(
    make: Callable[..., Made], rows: Float, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = make(kind)
    with made.session() as session:
        session.prefill(rows[:, :20])
        expected = session.decode(3)
        session.rewind(20)
        decoder = decoder_of(session)
        with monkeypatch.context() as patched:
            patched.setattr(decoder._logits, "read", _interrupt)
            with pytest.raises(KeyboardInterrupt):
                session.decode(9)
        assert session.position == 20
        assert np.allclose(session.decode(3), expected, atol=1e-5)


def _interrupt() -> None:
    raise KeyboardInterrupt


@EVERY
def test_rows_that_were_no_numbers_are_forgotten_with_a_rewind(
    make: Callable[..., Made], rows: Float, kind: str
) -> None:
    with make(kind).session() as session:
        expected = session.prefill(rows[:, :20])
        session.prefill(np.full_like(rows[:, :10], np.nan))
        session.rewind(0)
        assert np.allclose(session.prefill(rows[:, :20]), expected, atol=1e-5)


@EVERY
def test_more_rows_than_the_context_are_refused(make: Callable[..., Made], rows: Float, kind: str) -> None:
    with make(kind).session() as session:
        session.prefill(rows)
        with pytest.raises(DoesNotFitError, match="580 rows do not fit into the context of 512"):
            session.prefill(rows)
        with pytest.raises(UsageError, match="at least one row"):
            session.prefill(rows[:, :0])
        assert session.position == 290


@EVERY
def test_what_runs_is_told(make: Callable[..., Made], kind: str) -> None:
    made = make(kind)
    with open_bundle(made.root, "tensorrt", encoder_precision="fp32", decoder_precision="fp32") as vlm:
        info = vlm.info
    library = "tensorrt-rtx" if kind == "rtx" else "tensorrt"
    assert (info["library"], info["version"]) == (library, KINDS[kind][0])
    assert (info["device"], info["device_name"], info["compute_capability"]) == ("cuda", "Fake GPU", "8.7")
    assert (info["cuda"], info["cuda_driver"]) == ("12.6", "12.8")
    told = info["engines"][DECODER]
    assert told["kv_cache"] == ("rows" if kind == "rows" else "in place")
    assert told["profiles"] == ["decode", "prefill"]
    assert "sm_87" in told["built_for"]


def test_engines_of_another_device_or_version_are_refused_with_the_command(
    make: Callable[..., Made], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = make("rows")
    install(monkeypatch, fake_cuda(capability=(8, 9)))
    with pytest.raises(UnsupportedError, match=r"built for sm_87 .*10\.3\.0.*here is sm_89.*edgevlm build"):
        open_bundle(made.root, "tensorrt", encoder_precision="fp32")
    install(monkeypatch, made.cuda)
    put_library(monkeypatch, "10.13.2.6", "tensorrt")
    with pytest.raises(UnsupportedError, match=r"built for sm_87 .*10\.3\.0.*here is sm_87.*10\.13.*edgevlm build"):
        open_bundle(made.root, "tensorrt", encoder_precision="fp32")
    put_library(monkeypatch, *OLD)
    with pytest.raises(UnsupportedError, match=r"has no engine for .* yet: run `edgevlm build"):
        open_bundle(made.root, "tensorrt", encoder_precision="fp32", decoder_precision="fp16")


def test_a_missing_library_is_told_with_its_command(make: Callable[..., Made], monkeypatch: pytest.MonkeyPatch) -> None:
    made = make("rows")
    for name in CUDA_MODULES:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingLibraryError, match="cuda-python is not installed: pip install cuda-python"):
        open_bundle(made.root, "tensorrt")
    for name in MODULES:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingLibraryError, match="tensorrt is not installed"):
        open_bundle(made.root, "tensorrt")


def test_a_damaged_engine_is_refused_and_nothing_is_kept(make: Callable[..., Made]) -> None:
    made = make("rows")
    [engine] = made.root.glob(f"tensorrt/engines/*/{DECODER}.engine")
    engine.write_bytes(bytes(engine.stat().st_size))
    with pytest.raises(IntegrityError, match="changed or damaged"), made.session():
        pass


def test_a_decoder_of_another_shape_is_refused(make: Callable[..., Made]) -> None:
    made = make("in-place")
    manifest = read_bundle(made.root).manifest
    decoder = replace(manifest.decoder, num_layers=manifest.decoder.num_layers + 1)
    write_manifest(made.root, replace(manifest, decoder=decoder))
    write_sums(made.root)
    with pytest.raises(IntegrityError, match="promises a kv cache of 5 layers"), made.session():
        pass
