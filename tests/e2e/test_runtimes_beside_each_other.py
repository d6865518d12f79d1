"""One question, answered by every runtime and by mixtures of them, and what the answers carry."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from edgevlm import shipped
from edgevlm.cli.app import app
from edgevlm.core.optional import is_installed
from edgevlm.runtimes.open import open_bundle

DEMO = next(iter(shipped.__path__)) + "/demo.png"
QUESTION = ["--image", DEMO, "--prompt", "What color is the circle?", "--max-tokens", "8"]
NEEDS_OPENVINO = pytest.mark.skipif(
    not is_installed("openvino"), reason="openvino is not installed: pip install 'edgevlm[openvino]'"
)


@pytest.fixture(autouse=True)
def same_threads_afterwards() -> Iterator[None]:
    """``--threads`` with PyTorch is a setting of the process."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def answer(*flags: str) -> dict[str, Any]:
    result = CliRunner().invoke(app, ["run", "nano", *QUESTION, *flags, "--json", "-q"])
    assert (result.exit_code, result.stderr) == (0, "")
    found: dict[str, Any] = json.loads(result.stdout)
    return found


@pytest.fixture(scope="module")
def expected() -> dict[str, Any]:
    return answer()


def test_the_checkpoint_in_pytorch_says_what_its_bundle_says(expected: dict[str, Any]) -> None:
    found = answer("--runtime", "torch", "--threads", "1")
    assert torch.get_num_threads() == 1
    assert found["token_ids"] == expected["token_ids"]
    assert found["num_vision_tokens"] == expected["num_vision_tokens"]


@NEEDS_OPENVINO
@pytest.mark.parametrize(
    "flags",
    [
        ["--runtime", "openvino"],
        ["--encoder-runtime", "openvino"],
        ["--decoder-runtime", "openvino", "--device", "cpu"],
        ["--encoder-runtime", "openvino", "--decoder-runtime", "onnxruntime", "--threads", "1"],
    ],
    ids=lambda flags: " ".join(flags),
)
def test_every_mixture_of_runtimes_gives_the_same_answer(flags: list[str], expected: dict[str, Any]) -> None:
    assert answer(*flags)["token_ids"] == expected["token_ids"]


@NEEDS_OPENVINO
def test_the_info_of_an_opened_bundle_tells_both_halves() -> None:
    with open_bundle("nano", encoder_runtime="openvino", threads=1) as vlm:
        info = vlm.info
    assert (info["runtime"], info["library"]) == ("onnxruntime", "onnxruntime")
    assert (info["encoder"]["runtime"], info["encoder"]["library"]) == ("openvino", "openvino")
    assert info["threads"] == info["encoder"]["threads"] == 1


@NEEDS_OPENVINO
def test_verify_passes_with_openvino_in_both_halves() -> None:
    result = CliRunner().invoke(app, ["verify", "nano", "--runtime", "openvino", "--json", "-q"])
    assert result.exit_code == 0, result.output
    verified = json.loads(result.stdout)
    assert verified["passed"]
    assert verified["runtime"]["library"] == "openvino"


def test_an_evaluation_in_pytorch_says_so_and_takes_the_checkpoint_s_own_suite() -> None:
    flags = ["--num-scenes", "2", "--no-controls", "--runtime", "torch", "--json", "-q"]
    result = CliRunner().invoke(app, ["eval", "nano", *flags])
    assert result.exit_code == 0, result.output
    record = json.loads(result.stdout)
    assert (record["runtime"], record["suite"], record["bundle_sha256"]) == ("torch", "scenes", None)
    assert record["versions"]["torch"] == torch.__version__


def test_a_measurement_in_pytorch_says_what_it_ran() -> None:
    flags = ["-r", "2", "-n", "2", "--runtime", "torch", "--threads", "1", "--json", "-q"]
    result = CliRunner().invoke(app, ["bench", "nano", *flags])
    assert result.exit_code == 0, result.output
    runtime = json.loads(result.stdout)["conditions"]["runtime"]
    assert {"runtime": "torch", "device": "cpu", "threads": 1, "family": "edgevlm"}.items() <= runtime.items()
