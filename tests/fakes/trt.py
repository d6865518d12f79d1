"""Stands for the module ``tensorrt``, in the versions whose surfaces differ: 10.3 (JetPack 6), 10.13, 11.4, and RTX.

What is there and what is not follows the vendor's own documents and the bindings of 11.4:

* networks: STRONGLY_TYPED is bit 1 up to 10.x; 11.x keeps the name at bit 0 and ignores it; RTX types always
* data types: FP4 from 10.8 on
* KV caches in place (``INetworkDefinition.add_kv_cache_update``, ONNX TensorScatter) from 10.15 on, and in RTX
* ``ICudaEngine.device_memory_size`` up to 10.x, ``device_memory_size_v2`` in all
* RTX: ``ComputeCapability`` and ``IBuilderConfig.set_compute_capability``, no timing cache in use

A "serialized engine" names the ONNX file that it was built from, and runs it in ONNX Runtime on the addresses that are
bound: what comes out is what the graph computes.  A graph in place is run with its outputs copied to their addresses.
"""

from __future__ import annotations

import ctypes
import enum
import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import onnx

CONTEXT_BYTES = 1 << 16
MAGIC = b"ENGINE OF A FAKE\n"
NEW_OPERATORS = {"TensorScatter": (10, 15)}
NEW_TYPES = {"FLOAT4E2M1": (10, 8), "INT4": (10, 0), "FLOAT8E4M3FN": (9, 0), "BFLOAT16": (9, 0)}
TYPES = {
    "FLOAT": "FLOAT",
    "FLOAT16": "HALF",
    "BFLOAT16": "BF16",
    "INT8": "INT8",
    "INT32": "INT32",
    "INT64": "INT64",
    "BOOL": "BOOL",
    "UINT8": "UINT8",
    "FLOAT8E4M3FN": "FP8",
    "INT4": "INT4",
    "FLOAT4E2M1": "FP4",
}
BYTES = {"FLOAT": 4, "HALF": 2, "BF16": 2, "INT8": 1, "INT32": 4, "INT64": 8, "BOOL": 1, "UINT8": 1, "FP8": 1}


def fake_tensorrt(
    version: str,
    flavour: str = "tensorrt",
    *,
    memory: int | None = None,
    compute_capability: str = "8.7",
    num_steps: int = 3,
    has_driver: bool = True,
) -> ModuleType:
    """A module with the surface of ``version``.

    ``memory``: bytes of graph and weights from which on a build runs out of memory.  ``num_steps`` of a build, between
    which it asks the progress monitor whether to go on.
    """
    numbers = tuple(int(word) for word in version.split("."))
    module: Any = ModuleType("tensorrt_rtx" if flavour == "rtx" else "tensorrt")
    module.__version__ = version
    module.fake = SimpleNamespace(
        version=version,
        numbers=(99,) if flavour == "rtx" else numbers,
        flavour=flavour,
        memory=memory,
        compute_capability=compute_capability,
        num_steps=num_steps,
        has_driver=has_driver,
        builds=[],  # one record for every build that was begun
        contexts=[],
    )
    _add_enums(module)
    _add_classes(module)
    return module


def _members(name: str, **values: int) -> Any:
    return enum.IntEnum(name, values)


def _add_enums(module: Any) -> None:
    fake = module.fake
    types = ["FLOAT", "HALF", "INT8", "INT32", "BOOL", "UINT8", "FP8", "BF16", "INT64", "INT4"]
    module.DataType = _members("DataType", **{name: i for i, name in enumerate(types)})
    if fake.numbers >= (10, 8):
        module.DataType = _members("DataType", **{name: i for i, name in enumerate([*types, "FP4"])})
    old = fake.flavour == "tensorrt" and fake.numbers < (11,)
    flags = {"EXPLICIT_BATCH": 0, "STRONGLY_TYPED": 1} if old else {"STRONGLY_TYPED": 0}
    module.NetworkDefinitionCreationFlag = _members("NetworkDefinitionCreationFlag", **flags)
    module.BuilderFlag = _members("BuilderFlag", REFIT=4, TF32=6, VERSION_COMPATIBLE=12, STRIP_PLAN=18)
    levels = {"NONE": 0, "AMPERE_PLUS": 1}
    if fake.numbers >= (10, 13):
        levels["SAME_COMPUTE_CAPABILITY"] = 2
    module.HardwareCompatibilityLevel = _members("HardwareCompatibilityLevel", **levels)
    module.MemoryPoolType = _members("MemoryPoolType", WORKSPACE=0, DLA_MANAGED_SRAM=1)
    strategies = {"STATIC": 0, "ON_PROFILE_CHANGE": 1, "USER_MANAGED": 2}
    module.ExecutionContextAllocationStrategy = _members("ExecutionContextAllocationStrategy", **strategies)
    module.TensorIOMode = _members("TensorIOMode", NONE=0, INPUT=1, OUTPUT=2)
    module.TensorLocation = _members("TensorLocation", DEVICE=0, HOST=1)
    strategies = {"STATIC": 0, "ON_PROFILE_CHANGE": 1, "USER_MANAGED": 2}
    module.ExecutionContextAllocationStrategy = _members("ExecutionContextAllocationStrategy", **strategies)
    if fake.flavour == "rtx":
        module.CudaGraphStrategy = _members("CudaGraphStrategy", DISABLED=0, WHOLE_GRAPH_CAPTURE=1)
        names = {"NONE": 0, "CURRENT": 1, "SM75": 75, "SM80": 80, "SM86": 86, "SM89": 89, "SM120": 120}
        module.ComputeCapability = _members("ComputeCapability", **names)


def _add_classes(module: Any) -> None:
    fake = module.fake

    class ILogger:
        Severity = _members("Severity", INTERNAL_ERROR=0, ERROR=1, WARNING=2, INFO=3, VERBOSE=4)
        INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = Severity

        def log(self, severity: Any, msg: str) -> None:
            raise NotImplementedError

    class IProgressMonitor:
        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None: ...

        def step_complete(self, phase_name: str, step: int) -> bool:
            return True

        def phase_finish(self, phase_name: str) -> None: ...

    class INetworkDefinition:
        def __init__(self, flags: int) -> None:
            self.flags, self.path, self.model = flags, None, None

    if fake.numbers >= (10, 15):
        INetworkDefinition.add_kv_cache_update = lambda *tensors: None  # type: ignore[attr-defined]

    class Builder:
        def __init__(self, logger: ILogger) -> None:
            self.logger = logger

        def create_network(self, flags: int = 0) -> INetworkDefinition | None:
            if fake.flavour == "rtx" and flags:
                self.logger.log(ILogger.ERROR, "[createNetworkV2] Error Code 3: Parameter check failed")
                return None
            return INetworkDefinition(flags)

        def create_builder_config(self) -> Any:
            return IBuilderConfig()

        def create_optimization_profile(self) -> Any:
            return IOptimizationProfile()

        def build_serialized_network(self, network: INetworkDefinition, config: Any) -> bytes | None:
            return _build(module, self.logger, network, config)

    class IOptimizationProfile:
        def __init__(self) -> None:
            self.shapes: dict[str, list[tuple[int, ...]]] = {}

        def set_shape(self, input: str, min: Any, opt: Any, max: Any) -> None:
            shapes = [tuple(min), tuple(opt), tuple(max)]
            if not all(a <= b <= c for a, b, c in zip(*shapes, strict=True)):
                raise ValueError(f"inconsistent shapes for {input}")
            self.shapes[input] = shapes

    class ITimingCache:
        def __init__(self, data: bytes) -> None:
            self.data = data

        def serialize(self) -> bytes:
            return self.data

    class IBuilderConfig:
        def __init__(self) -> None:
            self.profiles: list[Any] = []
            self.pools: dict[int, int] = {}
            self.flags = 0
            self.hardware_compatibility_level = module.HardwareCompatibilityLevel.NONE
            self.progress_monitor: Any = None
            self.timing_cache: Any = None

        def set_memory_pool_limit(self, pool: Any, pool_size: int) -> None:
            self.pools[int(pool)] = pool_size

        def set_flag(self, flag: Any) -> None:
            self.flags |= 1 << int(flag)

        def add_optimization_profile(self, profile: Any) -> int:
            self.profiles.append(profile)
            return len(self.profiles) - 1

        def create_timing_cache(self, serialized_timing_cache: bytes) -> ITimingCache:
            return ITimingCache(bytes(serialized_timing_cache) or f"timings of {fake.version}:".encode())

        def set_timing_cache(self, cache: ITimingCache, ignore_mismatch: bool) -> bool:
            if not ignore_mismatch and not cache.data.startswith(f"timings of {fake.version}:".encode()):
                return False
            self.timing_cache = cache
            return True

        def get_timing_cache(self) -> ITimingCache | None:
            return self.timing_cache

    if fake.flavour == "rtx":
        IBuilderConfig.num_compute_capabilities = 0  # type: ignore[attr-defined]
        IBuilderConfig.set_compute_capability = (  # type: ignore[attr-defined]
            lambda self, capability, index: setattr(self, "compute_capability", capability) or True
        )

    class OnnxParser:
        def __init__(self, network: INetworkDefinition, logger: ILogger) -> None:
            self.network, self.errors = network, []

        def parse_from_file(self, path: str) -> bool:
            self.errors = _parse(module, self.network, path)
            return not self.errors

        @property
        def num_errors(self) -> int:
            return len(self.errors)

        def get_error(self, index: int) -> Any:
            text = self.errors[index]
            return SimpleNamespace(desc=lambda: text, code=lambda: 8)

    class Runtime:
        def __init__(self, logger: ILogger) -> None:
            self.logger, self.engine_host_code_allowed = logger, False

        def deserialize_cuda_engine(self, serialized_engine: Any) -> Any:
            return _deserialize(module, self, bytes(serialized_engine))

    names = (ILogger, IProgressMonitor, INetworkDefinition, Builder, IOptimizationProfile, ITimingCache)
    for one in (*names, IBuilderConfig, OnnxParser, Runtime):
        setattr(module, one.__name__, one)


# -- building -------------------------------------------------------------------------------------------------


def _parse(module: Any, network: Any, path: str) -> list[str]:
    """What this version cannot read of the file, empty where it can read all of it."""
    try:
        model = onnx.load(path, load_external_data=False)
    except Exception as error:
        return [f"Failed to parse the model: {error}"]
    network.path, network.model = path, model
    errors = [
        f"No importer registered for op: {node.op_type}. Attempting to import as plugin."
        for node in model.graph.node
        if module.fake.numbers < NEW_OPERATORS.get(node.op_type, (0,))
    ]
    for tensor in model.graph.initializer:
        name = onnx.TensorProto.DataType.Name(tensor.data_type)
        if module.fake.numbers < NEW_TYPES.get(name, (0,)):
            errors.append(f"Unsupported data type {name} of {tensor.name}")
        for entry in tensor.external_data:
            if entry.key == "location" and not (Path(path).parent / entry.value).is_file():
                errors.append(f"Failed to open file: {entry.value}")
    return errors[:3]


def _build(module: Any, logger: Any, network: Any, config: Any) -> bytes | None:
    fake, error = module.fake, module.ILogger.ERROR
    record = SimpleNamespace(path=network.path, flags=network.flags, config=config)
    fake.builds.append(record)
    problem = _profile_problem(network.model, config.profiles)
    if problem:
        logger.log(error, f"Error Code 4: API Usage Error ({problem})")
        return None
    if fake.memory is not None and _size(network.path, network.model) > fake.memory:
        logger.log(error, "[defaultAllocator.cpp::allocate] Error Code 1: Cuda Runtime (out of memory)")
        return None
    monitor = config.progress_monitor
    if monitor is not None:
        monitor.phase_start("Building Engine", None, fake.num_steps)
        monitor.phase_start("Tactic Selection", "Building Engine", 100)
        for step in range(fake.num_steps):
            monitor.step_complete("Tactic Selection", step)
            if not monitor.step_complete("Building Engine", step):
                logger.log(error, "Build cancelled by the progress monitor")
                return None
        monitor.phase_finish("Tactic Selection")
        monitor.phase_finish("Building Engine")
    if config.timing_cache is not None:
        config.timing_cache.data += Path(network.path).name.encode() + b";"
    named = getattr(config, "compute_capability", None)
    plan = {
        "path": str(Path(network.path).resolve()),
        "version": fake.version,
        "flavour": fake.flavour,
        "compute_capability": named.name if named is not None else fake.compute_capability,
        "host_code": bool(config.flags & 1 << int(module.BuilderFlag.VERSION_COMPATIBLE)),
        "profiles": [profile.shapes for profile in config.profiles],
    }
    return MAGIC + json.dumps(plan).encode()


def _profile_problem(model: Any, profiles: list[Any]) -> str:
    for value in model.graph.input:
        shape = _shape(value)
        if -1 not in shape:
            continue
        if not profiles:
            return f"Network has dynamic or shape inputs, but no optimization profile has been defined: {value.name}"
        for profile in profiles:
            given = profile.shapes.get(value.name)
            if given is None:
                return f"input {value.name} has dynamic dimensions but no shapes in a profile"
            for one in given:
                if len(one) != len(shape) or any(size not in (-1, n) for size, n in zip(shape, one, strict=True)):
                    return f"{value.name} has shape {shape}, a profile says {one}"
    return ""


def _size(path: str, model: Any) -> int:
    locations = {entry.value for t in model.graph.initializer for entry in t.external_data if entry.key == "location"}
    return Path(path).stat().st_size + sum((Path(path).parent / name).stat().st_size for name in locations)


def _shape(value: Any) -> tuple[int, ...]:
    return tuple(dim.dim_value if dim.HasField("dim_value") else -1 for dim in value.type.tensor_type.shape.dim)


# -- running --------------------------------------------------------------------------------------------------


def _deserialize(module: Any, runtime: Any, data: bytes) -> Any:
    fake, logger = module.fake, runtime.logger
    if not fake.has_driver:
        logger.log(
            module.ILogger.ERROR, "Error Code 1: Cuda Runtime (cudaError 35: CUDA driver version is insufficient)"
        )
        return None
    if not data.startswith(MAGIC):
        logger.log(module.ILogger.ERROR, "Error Code 1: Serialization (magic tag does not match)")
        return None
    plan = json.loads(data[len(MAGIC) :])
    is_same = plan["version"] == fake.version
    if plan["flavour"] != fake.flavour or not (is_same or plan["host_code"]):
        logger.log(module.ILogger.ERROR, "Error Code 1: Serialization (Version tag does not match)")
        return None
    if plan["host_code"] and not runtime.engine_host_code_allowed:
        logger.log(module.ILogger.ERROR, "Error Code 3: the engine holds host code, which is not allowed")
        return None
    return FakeEngine(module, runtime, plan)


class FakeEngine:
    """ICudaEngine over an ONNX file."""

    def __init__(self, module: Any, runtime: Any, plan: dict[str, Any]) -> None:
        self.module, self.logger, self.plan = module, runtime.logger, plan
        self.model = onnx.load(plan["path"], load_external_data=False)
        self.inputs = {value.name: value for value in self.model.graph.input}
        self.outputs = {value.name: value for value in self.model.graph.output}
        self._session: Any = None
        if module.fake.numbers < (11,):
            self.device_memory_size = CONTEXT_BYTES
            self.get_device_memory_size_for_profile = lambda profile: CONTEXT_BYTES
        if module.fake.numbers >= (10, 15):
            self.get_aliased_input_tensor = self._aliased
        if module.fake.flavour == "rtx":
            self.create_runtime_config = lambda: FakeRuntimeConfig()

    num_optimization_profiles = property(lambda self: max(1, len(self.plan["profiles"])))
    num_io_tensors = property(lambda self: len(self.inputs) + len(self.outputs))
    device_memory_size_v2 = property(lambda self: CONTEXT_BYTES)

    def get_device_memory_size_for_profile_v2(self, profile_index: int) -> int:
        return CONTEXT_BYTES

    def get_tensor_name(self, index: int) -> str:
        return [*self.inputs, *self.outputs][index]

    def get_tensor_mode(self, name: str) -> Any:
        modes = self.module.TensorIOMode
        return modes.INPUT if name in self.inputs else modes.OUTPUT if name in self.outputs else modes.NONE

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return _shape((self.inputs | self.outputs)[name])

    def get_tensor_dtype(self, name: str) -> Any:
        kind = (self.inputs | self.outputs)[name].type.tensor_type.elem_type
        return self.module.DataType[TYPES[onnx.TensorProto.DataType.Name(kind)]]

    def get_tensor_location(self, name: str) -> Any:
        return self.module.TensorLocation.DEVICE

    def get_tensor_profile_shape(self, name: str, profile: int) -> list[tuple[int, ...]]:
        profiles = self.plan["profiles"]
        shapes = profiles[profile].get(name) if profiles else None
        return [tuple(shape) for shape in shapes] if shapes else [self.get_tensor_shape(name)] * 3

    def create_execution_context(self, config: Any = 0) -> Any:
        context = FakeContext(self)
        context.config = config
        self.module.fake.contexts.append(context)
        return context

    def _aliased(self, name: str) -> str | None:
        makers = {out: node for node in self.model.graph.node for out in node.output}
        maker = makers.get(name)
        return maker.input[0] if maker is not None and maker.op_type == "TensorScatter" else None

    def session(self) -> Any:
        """The ONNX file in ONNX Runtime's CPU provider, opened once."""
        import onnxruntime

        if self._session is None:
            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = 1
            self._session = onnxruntime.InferenceSession(self.plan["path"], options, providers=["CPUExecutionProvider"])
        return self._session


class FakeRuntimeConfig:
    """IRuntimeConfig of RTX."""

    def __init__(self) -> None:
        self.strategy, self.cuda_graph_strategy = 0, 0

    def set_execution_context_allocation_strategy(self, strategy: Any) -> None:
        self.strategy = strategy


class FakeContext:
    """IExecutionContext whose device is the host: addresses are those of host memory."""

    def __init__(self, engine: FakeEngine) -> None:
        self.engine, self.profile = engine, 0
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}
        self.memory: tuple[int, int] | None = None
        self.config: Any = None
        self.num_runs = 0

    @property
    def active_optimization_profile(self) -> int:
        return self.profile

    def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool:
        if not 0 <= profile_index < self.engine.num_optimization_profiles:
            return False
        self.profile, self.shapes = profile_index, {}
        return True

    def set_device_memory(self, memory: int, size: int) -> None:
        self.memory = (int(memory), int(size))

    @property
    def lacks_memory(self) -> bool:
        """Whether it was made to compute in memory that is given to it, and has none, aligned and large enough."""
        if int(getattr(self.config, "strategy", self.config or 0)) != 2:
            return False
        address, size = self.memory or (0, 0)
        return not address or address % 256 != 0 or size < self.engine.device_memory_size_v2

    def set_input_shape(self, name: str, shape: Any) -> bool:
        least, _, largest = self.engine.get_tensor_profile_shape(name, self.profile)
        shape = tuple(shape)
        is_inside = len(shape) == len(least) and all(a <= n <= b for a, n, b in zip(least, shape, largest, strict=True))
        if name not in self.engine.inputs or not is_inside:
            self._log(f"Error Code 3: set dimension {shape} of {name} is outside of profile {self.profile}")
            return False
        self.shapes[name] = shape
        return True

    def infer_shapes(self) -> list[str]:
        free = (name for name in self.engine.inputs if -1 in self.engine.get_tensor_shape(name))
        return [name for name in free if name not in self.shapes]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        if name in self.engine.inputs:
            return self.shapes.get(name) or self.engine.get_tensor_shape(name)
        sizes = self._free_sizes()
        dims = self.engine.outputs[name].type.tensor_type.shape.dim
        return tuple(dim.dim_value if dim.HasField("dim_value") else sizes.get(dim.dim_param, -1) for dim in dims)

    def set_tensor_address(self, name: str, memory: int) -> bool:
        if name not in self.engine.inputs and name not in self.engine.outputs:
            return False
        self.addresses[name] = int(memory)
        return True

    def get_tensor_address(self, name: str) -> int:
        return self.addresses.get(name, 0)

    def execute_async_v3(self, stream_handle: int) -> bool:
        lacking = [name for name in (*self.engine.inputs, *self.engine.outputs) if not self.addresses.get(name)]
        if self.lacks_memory or any(address % 256 for address in self.addresses.values()):
            self._log("Error Code 3: the device memory is not set, too small or misaligned")
            return False
        if lacking or self.infer_shapes():
            self._log(f"Error Code 3: no address or shape for {lacking or self.infer_shapes()}")
            return False
        addresses, shapes = dict(self.addresses), {name: self.get_tensor_shape(name) for name in self.engine.inputs}
        captured = _capturing()
        if captured is None:
            self._run(addresses, shapes)
        else:
            captured.append(lambda: self._run(addresses, shapes))
        return True

    def _run(self, addresses: dict[str, int], shapes: dict[str, tuple[int, ...]]) -> None:
        session = self.engine.session()
        binding = session.io_binding()
        for name, value in self.engine.inputs.items():
            kind = value.type.tensor_type.elem_type
            binding.bind_input(name, "cpu", 0, kind, shapes[name], addresses[name])
        for name in self.engine.outputs:
            binding.bind_output(name, "cpu")
        session.run_with_iobinding(binding)
        for name, value in zip(self.engine.outputs, binding.get_outputs(), strict=True):
            ctypes.memmove(addresses[name], value.data_ptr(), value.tensor_size_in_bytes())
        self.num_runs += 1

    def _free_sizes(self) -> dict[str, int]:
        sizes = {}
        for name, shape in self.shapes.items():
            for dim, size in zip(self.engine.inputs[name].type.tensor_type.shape.dim, shape, strict=True):
                if dim.dim_param:
                    sizes[dim.dim_param] = size
        return sizes

    def _log(self, text: str) -> None:
        self.engine.logger.log(self.engine.module.ILogger.ERROR, text)


def _capturing() -> list[Any] | None:
    """Where a fake CUDA stream that is being captured collects its calls, None while none is."""
    for name in ("fakes.cuda", "tests.fakes.cuda"):
        captured = getattr(sys.modules.get(name), "CAPTURING", None)
        if captured is not None:
            return captured  # type: ignore[no-any-return]
    return None
