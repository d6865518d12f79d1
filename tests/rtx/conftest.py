"""TensorRT-RTX's builder for the tests of this folder."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest


def _harness() -> ModuleType:
    """`builder.py` beside this file."""
    name = "edgevlm_rtx_builder"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name("builder.py"))
        assert spec is not None
        assert spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


@pytest.fixture(scope="session")
def tensorrt_rtx(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """An ``RtxBuilder``: ``tensorrt_rtx.build(graph, profiles)`` says what became of it."""
    harness = _harness()
    if reason := harness.missing():
        pytest.skip(reason)
    return harness.assemble(tmp_path_factory.mktemp("rtx"))
