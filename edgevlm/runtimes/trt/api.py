"""The one place that knows TensorRT's versions: the rest of the package asks :class:`Api`, never the vendor's module.

What a version can do is read from the module itself (an enum member, a method), so a release that nobody here has seen
is judged by what it offers.  Checked against the bindings of 11.4 over TensorRT-RTX 1.7.1 on a CPU, and against fakes
with the surfaces of 10.3, 10.13 and 11.4; not run on hardware yet.
"""

from __future__ import annotations

import ctypes
import logging
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any, Literal, TypeAlias

from edgevlm.core.errors import (
    DeviceError,
    DoesNotFitError,
    IntegrityError,
    MissingLibraryError,
    UnsupportedError,
    UsageError,
)
from edgevlm.core.optional import fix_command, require

logger = logging.getLogger(__name__)

Flavour: TypeAlias = Literal["tensorrt", "rtx"]
Shape: TypeAlias = tuple[int, ...]
Shapes: TypeAlias = Mapping[str, Sequence[Shape]]  # input -> its least, usual and largest shape
Report: TypeAlias = Callable[[str], None]

MODULES = ("tensorrt", "tensorrt_rtx", "tensorrt_bindings")
OLDEST = (10, 3)  # JetPack 6; before it, networks are typed otherwise and int4 blocks are unknown
ALWAYS_TYPED_FROM = 11
MOST_LOGGED = 200
WAIT_S = 0.2  # between two looks at a build: on Windows a thread that waits for longer takes no Ctrl-C
OUT_OF_MEMORY = ("out of memory", "outofmemory", "insufficient memory", "could not be allocated", "bad_alloc")
NO_DRIVER = "cuda runtime ("  # how TensorRT tells an error of CUDA itself
DTYPES = {  # as TensorRT says it: as manifests say it
    "FLOAT": "float32",
    "HALF": "float16",
    "BF16": "bfloat16",
    "INT8": "int8",
    "INT32": "int32",
    "INT64": "int64",
    "BOOL": "bool",
    "UINT8": "uint8",
    "FP8": "float8_e4m3fn",
    "INT4": "int4",
    "FP4": "float4_e2m1",
}


@dataclass(frozen=True, kw_only=True)
class BuildSettings:
    """How one graph becomes an engine.

    ``profiles`` in the order of their index in the engine.  ``compute_capability`` names the device to build for where
    the library can (see :attr:`Api.builds_ahead_of_time`); None is the GPU that is there.
    """

    profiles: Sequence[Shapes]
    workspace_bytes: int
    version_compatible: bool = False
    hardware_compatible: bool = False
    compute_capability: tuple[int, int] | None = None


@dataclass(frozen=True)
class Built:
    """A serialized engine and, where the version keeps one, the timing cache after the build."""

    engine: memoryview
    timing_cache: bytes | None


@dataclass(frozen=True)
class EngineTensor:
    """An input or output of an engine; a free dimension is -1.

    ``shares``, of an output: the input whose memory it must be bound to, None where it has memory of its own.
    ``on_host``: the engine reads it from host memory when it is enqueued, as it does with shapes.
    """

    name: str
    dtype: str
    shape: Shape
    is_input: bool
    shares: str | None = None
    on_host: bool = False


@dataclass(frozen=True)
class Api:
    """TensorRT as it is installed: ``flavour`` and ``version`` are those of the library that computes."""

    module: Any
    flavour: Flavour
    version: tuple[int, ...]

    @property
    def version_text(self) -> str:
        """The version with dots, such as "10.3.0"."""
        return ".".join(map(str, self.version))

    @property
    def name(self) -> str:
        """The library and its version, for people."""
        return f"{'TensorRT-RTX' if self.flavour == 'rtx' else 'TensorRT'} {self.version_text}"

    @property
    def has_in_place_cache(self) -> bool:
        """Whether a graph may write into a cache that is bound as input and as output (TensorScatter; from 10.15)."""
        return hasattr(getattr(self.module, "INetworkDefinition", None), "add_kv_cache_update")

    @property
    def has_timing_cache(self) -> bool:
        """Whether timings of a build speed up the next; TensorRT-RTX times nothing, and asks for a GPU if told to."""
        return self.flavour == "tensorrt" and hasattr(self.module.IBuilderConfig, "create_timing_cache")

    @property
    def builds_ahead_of_time(self) -> bool:
        """Whether engines can be built for a device that is not here."""
        return self.flavour == "rtx"

    @property
    def has_version_compatible(self) -> bool:
        """Whether engines can be built for later versions as well; those of TensorRT-RTX fit one version."""
        return self.flavour == "tensorrt" and hasattr(self.module.BuilderFlag, "VERSION_COMPATIBLE")

    @property
    def has_hardware_compatible(self) -> bool:
        """Whether engines can be built for all GPUs from compute capability 8.0 on."""
        levels = getattr(self.module, "HardwareCompatibilityLevel", None)
        return self.flavour == "tensorrt" and hasattr(levels, "AMPERE_PLUS")

    @property
    def captures_itself(self) -> bool:
        """Whether CUDA graphs are its own affair: TensorRT-RTX swaps kernels while it runs, which others would miss."""
        return self.flavour == "rtx"

    @property
    def network_flags(self) -> int:
        """What makes a network compute in the types of its graph: a flag up to 10.x, always so from 11 on."""
        if self.flavour == "rtx" or self.version[0] >= ALWAYS_TYPED_FROM:
            return 0
        return 1 << int(self.module.NetworkDefinitionCreationFlag.STRONGLY_TYPED)

    def has_type(self, name: str) -> bool:
        """Whether the version knows the data type ``name``, as its own enum spells it ("FP8", "BF16")."""
        return hasattr(self.module.DataType, name)

    def build(
        self, graph: Path, settings: BuildSettings, *, report: Report | None = None, timing_cache: bytes | None = None
    ) -> Built:
        """The engine of the ONNX file ``graph``; ``report`` hears how far it is ("12 of 80"), in another thread.

        All of it happens in a thread of its own, which has CUDA's first device whatever the caller's has.  A signal
        such as Ctrl-C ends the build at its next step and is then handled as usual.

        Raises UnsupportedError for a graph that this version does not take, DoesNotFitError where memory ran out,
        UsageError for settings that it lacks.
        """
        with _signals_held() as held:
            monitor = _monitor(self.module, report or (lambda step: None), held)
            return _beside(lambda: self._build(graph, settings, monitor, timing_cache), held)

    def _build(self, graph: Path, settings: BuildSettings, monitor: Any, timing_cache: bytes | None) -> Built:
        log = _log_of(self.module)
        log.messages.clear()
        builder = self.made(self.module.Builder(log), "builder", log)
        network = self.made(builder.create_network(self.network_flags), "network", log)
        parser = self.made(self.module.OnnxParser(network, log), "parser", log)
        if not parser.parse_from_file(str(graph)):
            raise UnsupportedError(f"{graph.name}: {self.name} cannot read it: {_parser_errors(parser) or log.last()}")
        config = self._config(builder, settings)
        cache = self._attach_timing_cache(config, timing_cache)
        if monitor is not None:
            config.progress_monitor = monitor
        engine = builder.build_serialized_network(network, config)
        if engine is None:
            raise self._build_failure(graph, log)
        kept = bytes(cache.serialize()) if cache is not None else None
        return Built(memoryview(engine), kept)

    def deserialize(self, engine: Any, *, host_code: bool = False) -> Engine:
        """An engine opened from its bytes (anything with a buffer, such as a mapped file).

        ``host_code``: it was built version-compatible, so it carries a runtime of its own that has to be allowed.
        Raises IntegrityError when this version on this device refuses it, DoesNotFitError where memory is short,
        DeviceError without a GPU or its driver.
        """
        log = _log_of(self.module)
        log.messages.clear()
        runtime = self.made(self.module.Runtime(log), "runtime", log)
        if host_code:
            runtime.engine_host_code_allowed = True
        opened = runtime.deserialize_cuda_engine(engine)
        if opened is None:
            self.raise_if_out_of_memory("the engine", log)
            if any(NO_DRIVER in text.lower() for text in log.errors()):
                raise DeviceError(f"{self.name} cannot reach a GPU: {log.last()}; see `nvidia-smi`")
            raise IntegrityError(f"{self.name} refuses the engine ({log.last()}): build it again with `edgevlm build`")
        return Engine(self, opened, runtime)

    def made(self, made: Any, what: str, log: Any) -> Any:
        """``made`` itself; a vendor's None is told as the error that it stands for."""
        if made is None:
            self.raise_if_out_of_memory(f"the {what}", log)
            raise DeviceError(f"{self.name} could not make its {what}: {log.last()}")
        return made

    def _config(self, builder: Any, settings: BuildSettings) -> Any:
        module, config = self.module, builder.create_builder_config()
        config.set_memory_pool_limit(module.MemoryPoolType.WORKSPACE, settings.workspace_bytes)
        if settings.version_compatible:
            self.require_compatible("--version-compatible", self.has_version_compatible)
            config.set_flag(module.BuilderFlag.VERSION_COMPATIBLE)
        if settings.hardware_compatible:
            self.require_compatible("--hardware-compatible", self.has_hardware_compatible)
            config.hardware_compatibility_level = module.HardwareCompatibilityLevel.AMPERE_PLUS
        if self.builds_ahead_of_time and settings.compute_capability is not None:
            self._name_device(config, settings.compute_capability)
        for shapes in settings.profiles:
            profile = builder.create_optimization_profile()
            for name, (smallest, best, largest) in shapes.items():
                profile.set_shape(name, tuple(smallest), tuple(best), tuple(largest))
            config.add_optimization_profile(profile)
        return config

    def require_compatible(self, flag: str, is_there: bool) -> None:
        """Raises UsageError where ``flag`` asks for what this library lacks."""
        if not is_there:
            raise UsageError(f"{self.name} has no {flag}: leave it out")

    def _name_device(self, config: Any, capability: tuple[int, int]) -> None:
        """Build for one device; without that part of the API, engines run on all from 8.6 on."""
        member = getattr(getattr(self.module, "ComputeCapability", None), "SM{}{}".format(*capability), None)
        if member is not None and hasattr(config, "set_compute_capability"):
            config.num_compute_capabilities = 1
            config.set_compute_capability(member, 0)
        elif capability < (8, 6):
            raise UnsupportedError(f"{self.name} cannot build for compute capability {dotted(capability)}")

    def _attach_timing_cache(self, config: Any, known: bytes | None) -> Any:
        if not self.has_timing_cache:
            return None
        cache = config.create_timing_cache(known or b"")
        if cache is None or not config.set_timing_cache(cache, ignore_mismatch=False):
            if known:
                logger.warning("the timing cache is ignored: it was made by another version or on another device")
                return self._attach_timing_cache(config, None)
            return None
        return cache

    def _build_failure(self, graph: Path, log: Any) -> Exception:
        try:
            self.raise_if_out_of_memory(f"building {graph.name}", log)
        except DoesNotFitError as error:
            return error
        return UnsupportedError(f"{graph.name}: {self.name} cannot build it: {log.last()}")

    def raise_if_out_of_memory(self, what: str, log: Any) -> None:
        """Raises DoesNotFitError where the vendor's ``log`` says that memory ran out."""
        for text in log.errors():
            if any(words in text.lower() for words in OUT_OF_MEMORY):
                raise DoesNotFitError(
                    f"{what}: out of memory ({text[:200]}); close other programs, or take a smaller --workspace-mb, "
                    "--batch, image size or precision (int4)"
                )


class Engine:
    """An engine of the vendor's; contexts made of it run the graph."""

    def __init__(self, api: Api, raw: Any, runtime: Any) -> None:
        self.api, self.raw = api, raw
        self._runtime = runtime  # which must outlive the engine

    @property
    def num_profiles(self) -> int:
        """How many optimization profiles it was built with."""
        return int(self.raw.num_optimization_profiles)

    def memory_of_profile(self, profile: int) -> int:
        """What one context needs on the device while it follows the profile numbered ``profile``, weights apart."""
        newer = getattr(self.raw, "get_device_memory_size_for_profile_v2", None)
        return int((newer or self.raw.get_device_memory_size_for_profile)(profile))

    def tensors(self) -> tuple[EngineTensor, ...]:
        """Every input and output, in the engine's order."""
        raw, module = self.raw, self.api.module
        found = []
        for name in (raw.get_tensor_name(i) for i in range(raw.num_io_tensors)):
            is_input = raw.get_tensor_mode(name) == module.TensorIOMode.INPUT
            dtype, shape = str(raw.get_tensor_dtype(name).name), tuple(raw.get_tensor_shape(name))
            shares = None if is_input else self._shared_input(name)
            on_host = raw.get_tensor_location(name) == module.TensorLocation.HOST
            found.append(EngineTensor(name, DTYPES.get(dtype, dtype.lower()), shape, is_input, shares, on_host))
        return tuple(found)

    def _shared_input(self, name: str) -> str | None:
        ask = getattr(self.raw, "get_aliased_input_tensor", None)
        return (ask(name) or None) if ask else None

    def profile_shape(self, name: str, profile: int) -> tuple[Shape, Shape, Shape]:
        """The smallest, best and largest shape of the input ``name`` in the profile numbered ``profile``."""
        smallest, best, largest = (tuple(shape) for shape in self.raw.get_tensor_profile_shape(name, profile))
        return smallest, best, largest

    def create_context(self, *, own_memory: bool = True, repeats: bool = False) -> Context:
        """What runs the engine, one at a time; several may stand beside each other, each with a profile of its own.

        Without ``own_memory`` the caller lends it some before it runs (:meth:`Context.set_memory`), so that contexts
        that never run at once can share.  ``repeats``: it will run with the same shapes many times, which is worth a
        CUDA graph where :attr:`Api.captures_itself`.  Raises DoesNotFitError where memory is short.
        """
        log = _log_of(self.api.module)
        log.messages.clear()
        strategies = self.api.module.ExecutionContextAllocationStrategy
        strategy = strategies.STATIC if own_memory else strategies.USER_MANAGED
        config = self._runtime_config(strategy, repeats=repeats)
        raw = self.raw.create_execution_context(strategy if config is None else config)
        return Context(self.api, self.api.made(raw, "execution context", log), self, config)

    def _runtime_config(self, strategy: Any, *, repeats: bool) -> Any:
        """TensorRT-RTX's settings for a context; None for TensorRT, which takes the ``strategy`` alone."""
        if self.api.flavour != "rtx" or not hasattr(self.raw, "create_runtime_config"):
            return None
        config = self.raw.create_runtime_config()
        config.set_execution_context_allocation_strategy(strategy)
        if repeats and hasattr(self.api.module, "CudaGraphStrategy"):
            config.cuda_graph_strategy = self.api.module.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
        return config


class Context:
    """One run of an engine at a time: shapes and addresses are set, then it is enqueued on a stream."""

    def __init__(self, api: Api, raw: Any, engine: Engine, config: Any) -> None:
        self.api, self.raw, self.engine = api, raw, engine
        self._config = config  # which must outlive the context

    def set_profile(self, index: int, stream: int) -> None:
        """Follow the optimization profile numbered ``index`` from now on; shapes must be set again."""
        self._check(self.raw.set_optimization_profile_async(index, stream), f"optimization profile {index}")

    def set_memory(self, address: int, num_bytes: int) -> None:
        """Compute in this device memory, a multiple of 256; :meth:`Engine.memory_of_profile` says how much."""
        if hasattr(self.raw, "set_device_memory"):
            self.raw.set_device_memory(address, num_bytes)
        else:
            self.raw.device_memory = address

    def set_shape(self, name: str, shape: Shape) -> None:
        """Raises UnsupportedError where no engine was built for ``shape``."""
        if not self.raw.set_input_shape(name, tuple(shape)):
            raise UnsupportedError(
                f"the engine takes no {name} of shape {tuple(shape)} ({_log_of(self.api.module).last()}): "
                "build it with a larger --batch, or export for a longer context"
            )

    def shape(self, name: str) -> Shape:
        """The shape of ``name`` with the shapes that are set; an unknown dimension is -1."""
        return tuple(self.raw.get_tensor_shape(name))

    def set_address(self, name: str, address: int) -> None:
        """Bind the device memory at ``address`` to the tensor ``name``."""
        self._check(self.raw.set_tensor_address(name, address), f"the address of {name}")

    def enqueue(self, stream: int) -> None:
        """Run on the CUDA stream ``stream``.

        Raises DeviceError where the device refuses, DoesNotFitError where its memory ends.
        """
        log = _log_of(self.api.module)
        log.messages.clear()
        if not self.raw.execute_async_v3(stream):
            self.api.raise_if_out_of_memory("running the engine", log)
            raise DeviceError(f"{self.api.name} could not run the engine: {log.last()}")

    def _check(self, done: bool, what: str) -> None:
        if not done:
            raise DeviceError(f"{self.api.name} refuses {what}: {_log_of(self.api.module).last()}")


def load_tensorrt() -> Api:
    """The TensorRT that is installed, or TensorRT-RTX where only that is.

    Raises MissingLibraryError with the command that brings it, UnsupportedError where it is too old.
    """
    for name in MODULES:
        if _is_there(name):
            return api_of(require(name))
    raise MissingLibraryError("tensorrt", fix_command("tensorrt"))


def api_of(module: ModuleType) -> Api:
    """``module`` judged.  Raises UnsupportedError where it is older than this package can use."""
    name, version = module.__name__, _numbers(str(module.__version__))
    flavour: Flavour = "rtx" if name.startswith("tensorrt_rtx") else "tensorrt"
    if name == "tensorrt_bindings" and (library := _library_version(version[0])):
        flavour, version = library  # bindings come without their library, and what they found may be another one
    api = Api(module, flavour, version)
    if flavour == "tensorrt" and version[:2] < OLDEST:
        raise UnsupportedError(f"{api.name} is too old: {dotted(OLDEST)} or newer is needed (JetPack 6 brings it)")
    return api


def dotted(version: Sequence[int]) -> str:
    """Numbers with dots between them."""
    return ".".join(map(str, version))


def _is_there(name: str) -> bool:
    with suppress(ValueError):  # a module that was put there by hand has no spec
        return find_spec(name) is not None
    return True


def _numbers(version: str) -> tuple[int, ...]:
    numbers: list[int] = []
    for word in version.split("."):
        if not word.isdigit():
            break
        numbers.append(int(word))
    if not numbers:
        raise UnsupportedError(f"TensorRT calls its version {version!r}, which is not a number")
    return tuple(numbers)


def _library_version(major: int) -> tuple[Flavour, tuple[int, ...]] | None:
    """What the loaded ``libnvinfer`` says about itself: below 8 it is TensorRT-RTX, which counts its own versions."""
    try:
        number = int(ctypes.CDLL(f"libnvinfer.so.{major}").getInferLibVersion())
    except (OSError, AttributeError):
        return None
    scale = 10_000 if number >= 10_000 else 1_000  # 8.6.1 says 8601, 10.3.0 says 100300
    version = (number // scale, number % scale // 100, number % 100)
    return ("rtx" if version[0] < 8 else "tensorrt"), version


def _parser_errors(parser: Any) -> str:
    errors = [parser.get_error(i) for i in range(min(parser.num_errors, 3))]
    return "; ".join(" ".join(str(error.desc()).split())[:300] for error in errors)


# -- log ------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=8)
def _log_of(module: Any) -> Any:
    """The one log of ``module``: TensorRT keeps the first that it is given, whatever comes later."""

    class Log(module.ILogger):  # type: ignore[misc]
        """Remembers the last messages and passes them on."""

        def __init__(self) -> None:
            module.ILogger.__init__(self)
            self.messages: list[tuple[int, str]] = []

        def log(self, severity: Any, message: str) -> None:
            level = int(severity)
            if level <= int(module.ILogger.WARNING):
                self.messages = [*self.messages[-MOST_LOGGED:], (level, str(message))]
                logger.debug("TensorRT: %s", message)

        def errors(self) -> list[str]:
            return [text for level, text in self.messages if level <= int(module.ILogger.ERROR)]

        def last(self) -> str:
            texts = self.errors() or [text for _, text in self.messages]
            return " ".join(texts[-1].split())[:400] if texts else "it does not say why"

    return Log()


# -- progress and interrupts ----------------------------------------------------------------------------------


@dataclass
class _Held:
    """Signals that came while the vendor's code ran; ``is_given_up``: nobody waits for it any more."""

    signals: list[int] = field(default_factory=list)
    is_given_up: bool = False


@contextmanager
def _signals_held() -> Iterator[_Held]:
    """Only note signals that would end this process, and let them act when the block ends.

    An exception that a signal's handler raises inside a call-back would tear the vendor's C++ code down.  The second
    signal is not held.
    """
    held = _Held()
    if threading.current_thread() is not threading.main_thread():
        yield held
        return
    before: dict[int, Any] = {}

    def note(number: int, frame: FrameType | None) -> None:
        held.signals.append(number)
        if len(held.signals) > 1:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)

    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) not in (signal.SIG_IGN, None):
            before[number] = signal.signal(number, note)
    try:
        yield held
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for number in held.signals[:1]:
            signal.raise_signal(number)


def _beside(work: Callable[[], Built], held: _Held) -> Built:
    """What ``work`` gives, done in a thread of its own.

    Python handles signals in the main thread, between two of its steps; inside the vendor's code it would take none.
    """
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="tensorrt") as pool:
        building = pool.submit(work)
        try:
            while not building.done():
                wait([building], timeout=WAIT_S)
        except BaseException:
            held.is_given_up = True
            raise
        return building.result()


def _monitor(module: Any, report: Report, held: _Held) -> Any:
    """What TensorRT tells its progress to, and asks whether to go on; None where a version has none."""
    if not hasattr(module, "IProgressMonitor"):
        return None

    class Monitor(module.IProgressMonitor):  # type: ignore[misc]
        """Reports the phases that belong to no other; called by several threads."""

        def __init__(self) -> None:
            module.IProgressMonitor.__init__(self)
            self.steps: dict[str, int] = {}

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            if not parent_phase and num_steps > 0:
                self.steps[phase_name] = num_steps

        def step_complete(self, phase_name: str, step: int) -> bool:
            if phase_name in self.steps:
                self._tell(f"{step + 1} of {self.steps[phase_name]}")
            return not (held.signals or held.is_given_up)

        def phase_finish(self, phase_name: str) -> None:
            self.steps.pop(phase_name, None)

        def _tell(self, text: str) -> None:
            try:
                report(text)
            except Exception as error:  # whatever a call-back raises would end the process
                logger.debug("progress is not shown: %s", error)

    return Monitor()
