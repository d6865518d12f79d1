"""What this machine can do at most, measured in the same rounds as the engines: reading memory, and multiplying."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from time import perf_counter_ns
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from bench.peers.workers.serving import Answer, Serving, serve, since_ms

BYTES_PER_THREAD = 256 * 2**20  # far beyond any cache
SIDE = 2048  # of the square matrices
TIMES = 3
SOURCE = Path(__file__).with_name("read_bandwidth.c")

Words = NDArray[np.uint64]


class Ceilings:
    """Buffers that lie ready, one per thread."""

    def __init__(self, folder: Path, threads: int) -> None:
        torch.set_num_threads(threads)
        self._buffers = [np.ones(BYTES_PER_THREAD // 8, np.uint64) for _ in range(threads)]
        self._pool = ThreadPoolExecutor(threads)
        self.how, self._read = _reader(folder)

    def measure(self, request: Mapping[str, Any]) -> Answer:
        """Bytes and operations per second: the best of ``TIMES``, since a ceiling is what was reached."""
        return {
            "read_gb_per_s": max(self._read_speed() for _ in range(TIMES)),
            "gemm_fp32_gflop_per_s": max(_gemm_speed(torch.float32) for _ in range(TIMES)),
            "gemm_bf16_gflop_per_s": max(_gemm_speed(torch.bfloat16) for _ in range(TIMES)),
        }

    def _read_speed(self) -> float:
        started = perf_counter_ns()
        list(self._pool.map(self._read, self._buffers))
        return len(self._buffers) * BYTES_PER_THREAD / 1e6 / since_ms(started)


def _gemm_speed(dtype: torch.dtype) -> float:
    one = torch.ones(SIDE, SIDE, dtype=dtype)
    started = perf_counter_ns()
    torch.mm(one, one)
    return 2 * SIDE**3 / 1e6 / since_ms(started)


def _reader(folder: Path) -> tuple[str, Callable[[Words], object]]:
    """A compiled loop where there is a compiler, else numpy's dot product; both let other threads run."""
    compiler = shutil.which("cc")
    if compiler is None:
        return "numpy.dot", lambda words: np.dot(words.view(np.float32), words.view(np.float32))
    library = folder / "read_bandwidth.so"
    folder.mkdir(parents=True, exist_ok=True)
    options = ["-O3", "-march=native", "-shared", "-fPIC"]
    subprocess.run([compiler, *options, str(SOURCE), "-o", str(library)], check=True)
    add_up = ctypes.CDLL(str(library)).add_up
    add_up.restype, add_up.argtypes = ctypes.c_uint64, (ctypes.c_void_p, ctypes.c_size_t)
    return "compiled loop", lambda words: add_up(words.ctypes.data, words.size)


def load(arguments: Mapping[str, Any]) -> Serving:
    """``model``: a folder for the compiled loop."""
    ceilings = Ceilings(Path(arguments["model"]), arguments["threads"])
    return Serving({"ceilings": ceilings.measure}, {"version": torch.__version__, "reader": ceilings.how})


if __name__ == "__main__":
    serve(load)
