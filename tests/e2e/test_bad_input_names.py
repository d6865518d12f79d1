"""Names that nobody knows, and libraries that are not there."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

Refused = Callable[..., str]


@pytest.mark.parametrize("verb", ["run", "verify", "eval", "bench"])
def test_an_unknown_bundle_suggests_the_nearest(refused: Refused, verb: str) -> None:
    refused(3, ("named 'nanoo'; known: nano.", "Did you mean 'nano'?"), verb, "nanoo")


def test_an_unknown_model_suggests_the_nearest(tmp_path: Path, refused: Refused) -> None:
    words = ("named 'nanoo'; known: nano.", "Did you mean 'nano'?")
    refused(3, words, "export", "nanoo", tmp_path / "out")


def test_an_unknown_target_suggests_the_nearest(tmp_path: Path, tiny_checkpoint: Path, refused: Refused) -> None:
    words = ("no export target named 'onx'", "Did you mean 'onnx'?")
    refused(3, words, "export", tiny_checkpoint, tmp_path / "out", "--target", "onx")


@pytest.mark.parametrize("verb", ["run", "verify", "eval", "bench"])
def test_an_unknown_runtime_suggests_the_nearest(tiny_bundle: Path, refused: Refused, verb: str) -> None:
    words = ("no runtime named 'onnxrt'", "Did you mean 'onnxruntime'?")
    refused(3, words, verb, tiny_bundle, "--runtime", "onnxrt")


def test_an_unknown_suite_and_an_unknown_format_are_told(tiny_bundle: Path, refused: Refused) -> None:
    refused(3, "Did you mean 'scenes'?", "eval", tiny_bundle, "--suite", "scene")
    refused(2, "no output format named 'xml'; known: csv", "bench", tiny_bundle, "-o", "xml")


@pytest.mark.parametrize(
    ("library", "arguments", "fix"),
    [
        ("torch", ("export", "nano", "{out}"), "torch is not installed: pip install 'edgevlm[workshop]'"),
        ("onnxruntime", ("run", "{bundle}", "--prompt", "x"), "onnxruntime is not installed: pip install onnxruntime"),
        ("onnxruntime", ("verify", "{bundle}"), "onnxruntime is not installed: pip install onnxruntime"),
        ("PIL", ("run", "{bundle}", "--prompt", "x"), "PIL is not installed: pip install pillow"),
    ],
)
def test_a_missing_library_is_told_with_the_command_that_brings_it(
    root: Path, tmp_path: Path, tiny_bundle: Path, library: str, arguments: tuple[str, ...], fix: str
) -> None:
    given = [argument.format(out=tmp_path / "out", bundle=tiny_bundle) for argument in arguments]
    code = f"import sys; sys.modules[{library!r}] = None; from edgevlm.cli.app import main; main()"
    done = subprocess.run([sys.executable, "-c", code, *given], cwd=root, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (6, "", f"error: {fix}\n")
    assert list(tmp_path.iterdir()) == []
