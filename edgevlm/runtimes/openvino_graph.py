"""One ONNX file in OpenVINO: read, set up, fed and run, with the library's words turned into ours."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgevlm.core.errors import DoesNotFitError, EdgeVLMError, IntegrityError, UnsupportedError
from edgevlm.core.optional import require
from edgevlm.runtimes.session import Float

OUT_OF_MEMORY = ("allocate memory", "bad_alloc", "bad allocation", "out of memory", "cannot allocate")
UNKNOWN_OPERATOR = ("no conversion rule found", "opconversionfailure", "not implemented", "unsupported op")
NOISE = ("Exception from", "Check '", "FrontEnd API failed", "Summary:", "Model wasn't fully converted")


def properties(threads: int, computes_in: str) -> dict[str, object]:
    """How OpenVINO is set up, with the reasons.

    Its cache of compiled models stays off: such a blob is as large as the weights, fits one machine and one version,
    and would be written where nobody looks for it; compiling half a billion parameters takes two seconds.
    """
    return {
        "INFERENCE_NUM_THREADS": threads,
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": 1,  # one question at a time: every thread works on it
        # Without a hint a processor that has bfloat16 computes float32 graphs in it: three digits instead of seven.
        "INFERENCE_PRECISION_HINT": computes_in,
        "KV_CACHE_PRECISION": computes_in,  # else keys and values may be rounded to 8 bits
        # A pinned thread waits for whatever else runs on its core, and encoder and decoder would get the same cores.
        "ENABLE_CPU_PINNING": False,
    }


class Graph:
    """One compiled part with one request."""

    def __init__(self, request: Any, name: str) -> None:
        openvino = require("openvino")
        self._name, self._request, self._states = name, request, request.query_state()
        self._tensor, self._place = openvino.Tensor, openvino.Coordinate
        self._inputs: dict[str, NDArray[Any]] = {}  # the engine reads their memory: they must outlive the run

    def feed(self, name: str, array: NDArray[Any]) -> None:
        """Let the input ``name`` be the memory of ``array``, which is contiguous."""
        with errors(self._name):
            self._request.set_tensor(name, self._tensor(array, shared_memory=True))
        self._inputs[name] = array

    def run(self) -> None:
        with errors(self._name):
            self._request.infer()

    def output(self, name: str) -> NDArray[Any]:
        """A view of the output ``name``, which the next run overwrites."""
        with errors(self._name):
            found: NDArray[Any] = self._request.get_tensor(name).data
        return found

    def floats(self, name: str) -> Float:
        """A copy of the output ``name``, which the caller may keep."""
        return np.array(self.output(name), np.float32)

    def keep_rows(self, num_rows: int) -> None:
        """Drop what the kv cache holds behind its first ``num_rows``; where it is not longer nothing changes."""
        with errors(self._name):
            for variable in self._states:
                rows = variable.state
                batch, heads, length, size = rows.shape
                if length > num_rows:
                    end = self._place([batch, heads, num_rows, size])
                    variable.state = self._tensor(rows, self._place([0] * 4), end)


def read(file: str) -> Any:
    """The ONNX file as OpenVINO's own graph, weights mapped rather than copied where they stay as they are.

    Its general reader would also try its readers of other formats on a damaged file, which complain on stderr.
    """
    reader = require("openvino.frontend").FrontEndManager().load_by_framework("onnx")
    return reader.convert(reader.load(file))


def keep_inside(model: Any, cache: Mapping[str, str]) -> None:
    """Make every input of ``cache`` and the output that becomes it one variable of the graph."""
    passes = require("openvino.passes")
    manager = passes.Manager()
    manager.register_pass(passes.MakeStateful(dict(cache)))
    manager.run_passes(model)


@contextmanager
def errors(what: str, *, otherwise: type[EdgeVLMError] = EdgeVLMError) -> Iterator[None]:
    """Turn the library's exceptions into one clear line about ``what``."""
    try:
        yield
    except EdgeVLMError:
        raise
    except Exception as error:
        raise _translated(what, error, otherwise) from error


def _translated(what: str, error: Exception, otherwise: type[EdgeVLMError]) -> EdgeVLMError:
    message, lowered = _reason(error), str(error).lower()
    if isinstance(error, MemoryError) or any(words in lowered for words in OUT_OF_MEMORY):
        return DoesNotFitError(f"{what}: not enough memory ({message}); close other programs or take a smaller model")
    if any(words in lowered for words in UNKNOWN_OPERATOR):
        return UnsupportedError(f"{what}: this openvino lacks an operator ({message}); take --runtime onnxruntime")
    if otherwise is IntegrityError:
        return IntegrityError(f"{what}: cannot be loaded ({message}); copy or export the bundle again")
    return otherwise(f"{what}: openvino failed ({message})")


def _reason(error: Exception) -> str:
    """What an exception says, without the library's own files and lines around it."""
    lines = [line.strip(" -") for line in str(error).splitlines()]
    telling = [line for line in lines if line and not line.startswith(NOISE)]
    return " ".join(telling)[:300] or type(error).__name__
