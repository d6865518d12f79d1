"""ONNX Runtime's graphs: opened with the options that suit the part, fed without copies, complaining in one line."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray

from edgevlm.bundle.manifest import PartFile
from edgevlm.bundle.read import Bundle
from edgevlm.core.errors import DoesNotFitError, EdgeVLMError, IntegrityError, UnsupportedError, UsageError
from edgevlm.core.optional import require
from edgevlm.runtimes.heap import give_back
from edgevlm.runtimes.ort_devices import Device, check_placement, refuse_fallback

SILENT = 4  # the library's log level "fatal": its errors reach the user as ours, in one line
OUT_OF_MEMORY = ("allocate memory", "bad_alloc", "bad allocation", "out of memory")
UNKNOWN_OPERATOR = (
    *("not a registered function", "could not find an implementation"),
    "current official support for domain",  # which ends at an earlier opset
)


@dataclass(frozen=True, eq=False)
class Graph:
    """One opened part.

    ``elsewhere``: how many nodes of which kinds another provider than the wished one computes.  ``held``: memory of
    ours that the session reads.
    """

    name: str
    session: Any
    device: Device
    elsewhere: Mapping[str, int]
    held: object = None

    def run(self, outputs: list[str], feeds: Mapping[str, NDArray[Any]]) -> list[NDArray[Any]]:
        """The ``outputs``, which are the caller's to keep."""
        with errors(self.name):
            found: list[NDArray[Any]] = self.session.run(outputs, feeds)
        return found


def open_graph(bundle: Bundle, part: PartFile, device: Device, threads: int) -> Graph:
    """Load a part's file on ``device``.

    Raises IntegrityError for a file that is not the graph it should be, UnsupportedError for an operator that is
    missing or a graph that the device leaves to the CPU, DoesNotFitError when memory is short.
    """
    file = str(bundle.path(part.file))
    with errors(file, otherwise=IntegrityError):
        session = require("onnxruntime").InferenceSession(
            file, session_options(part.part, threads, device), providers=device.providers
        )
    give_back()
    return Graph(part.part, session, device, check_placement(part.part, device, session))


def session_options(part: str, threads: int, device: Device) -> Any:
    """How ONNX Runtime is set up for ``part``, with the reasons.

    Left as they are: prepacking, since a matrix laid out for the processor is worth its copy (without, 4-bit weights
    are unpacked again in every run), after which the mapped file's pages go back to the system; spinning of the
    decoder's threads, which meet hundreds of times per token; denormal numbers, since flushing them would change how
    the caller's own thread calculates.
    """
    options = require("onnxruntime").SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1  # the graphs are chains: there is nothing to run side by side
    options.log_severity_level = SILENT
    refuse_fallback(options, device)
    device.add_to(options)
    if part == "vision_encoder":
        # Every session has threads of its own, which after a run spin for some 15 ms in case there is more.
        # What comes is the decoder, on other threads but the same cores: those of the encoder must get off.
        options.add_session_config_entry("session.force_spinning_stop", "1")
    else:
        # A memory plan pays when the shapes it was made for come again; here lengths differ every time.
        options.enable_mem_pattern = False
        # An arena keeps the largest prefill's memory for good, rounded up to powers of two, and saves nothing that
        # can be measured: prefill and decode of half a billion parameters take as long without.
        options.enable_cpu_mem_arena = False
    return options


def bind(method: Callable[..., None], name: str, array: NDArray[Any]) -> None:
    """Let ``name`` be the memory of ``array`` (which must outlive the run), with its present shape."""
    method(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)


def still_open(graph: Graph | None) -> Graph:
    """``graph``, or UsageError where its engine was closed."""
    if graph is None:
        raise UsageError("this session is closed: open the bundle again")
    return graph


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
    message = str(error).splitlines()[0] if str(error) else type(error).__name__
    lowered = message.lower()
    if isinstance(error, MemoryError) or any(words in lowered for words in OUT_OF_MEMORY):
        return DoesNotFitError(f"{what}: not enough memory ({message}); close other programs or take a smaller model")
    if "fallback to cpu ep has been explicitly disabled" in lowered:
        return UnsupportedError(f"{what}: the device leaves nodes to the CPU: take another precision or no --device")
    if type(error).__name__ == "NotImplemented" or any(words in lowered for words in UNKNOWN_OPERATOR):
        return UnsupportedError(f"{what}: this onnxruntime lacks an operator ({message}); install a newer one")
    if otherwise is IntegrityError:
        return IntegrityError(f"{what}: cannot be loaded ({message}); copy or export the bundle again")
    return otherwise(f"{what}: onnxruntime failed ({message})")
