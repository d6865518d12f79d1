"""The flags that say what computes: the same on every verb, and what they become."""

from __future__ import annotations

import inspect
from dataclasses import fields
from importlib import import_module
from pathlib import Path
from typing import Annotated

import pytest
import typer
from typer.testing import CliRunner

from edgevlm.cli.app import app
from edgevlm.cli.opening import FLAGS, NO_WISHES, takes_wishes
from edgevlm.runtimes.choices import Wishes

VERBS = ("run", "bench", "eval", "verify")
ALL = {
    "--runtime": "openvino",
    "--encoder-runtime": "onnxruntime",
    "--decoder-runtime": "openvino-bf16",
    "--device": "cpu",
    "--encoder-precision": "int8",
    "--decoder-precision": "int4-b128",
    "--threads": "3",
    "--optimize": "memory",
    "--image-size": "512",
}
SWITCHES = ("--huge-pages",)


def failure(*arguments: object) -> tuple[int, str]:
    """Exit code and message of a command that prints nothing but its error."""
    result = CliRunner().invoke(app, [*map(str, arguments), "-q"])
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1
    return result.exit_code, result.stderr


def test_every_wish_has_a_flag_of_its_name() -> None:
    names = [field.name for field in fields(Wishes)]
    assert list(FLAGS) == names
    assert {*ALL, *SWITCHES} == {f"--{name.replace('_', '-')}" for name in names}


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_that_opens_a_bundle_has_the_flags_where_it_takes_wishes(verb: str) -> None:
    parameters = inspect.signature(import_module(f"edgevlm.cli.{verb}").command).parameters
    assert set(FLAGS) <= set(parameters)
    assert "wishes" not in parameters
    text = CliRunner().invoke(app, [verb, "--help"], env={"COLUMNS": "200"}).stdout
    assert all(flag in text for flag in (*ALL, *SWITCHES))


def parse(*arguments: str) -> tuple[str, Wishes, bool]:
    """What a small command of that kind is called with."""
    called = []

    @takes_wishes
    def command(
        name: Annotated[str, typer.Argument()],
        wishes: Wishes = NO_WISHES,
        loud: Annotated[bool, typer.Option("--loud")] = False,
    ) -> None:
        called.append((name, wishes, loud))

    small = typer.Typer()
    small.command()(command)
    result = CliRunner().invoke(small, arguments)
    assert result.exit_code == 0, result.output
    return called[0]


def test_flags_become_wishes_and_what_is_not_said_is_none() -> None:
    said = [*(word for pair in ALL.items() for word in pair), *SWITCHES]
    values = {flag[2:].replace("-", "_"): value for flag, value in ALL.items()}
    assert parse("nano", *said, "--loud") == (
        "nano",
        Wishes(**{**values, "threads": 3, "image_size": 512, "huge_pages": True}),
        True,
    )  # type: ignore[arg-type]
    assert parse("nano") == ("nano", Wishes(), False)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--runtime", "torch", "--encoder-runtime", "openvino"], "leave --encoder-runtime out"),
        (["--runtime", "torch", "--device", "cuda", "--optimize", "ttft"], "leave --device, --optimize out"),
        (["--runtime", "torch", "--decoder-precision", "int4"], "leave --decoder-precision out"),
        (["--runtime", "torch", "--threads", "0"], "threads must be 1 to 256, got 0"),
        (["--encoder-runtime", "torch"], "--encoder-runtime torch: PyTorch runs a checkpoint whole"),
        (["--decoder-runtime", "torch"], "--decoder-runtime torch: PyTorch runs a checkpoint whole"),
        (["--threads", "257"], "threads must be 1 to 256, got 257"),
    ],
)
def test_what_does_not_go_together_is_told_before_anything_is_loaded(flags: list[str], words: str) -> None:
    code, message = failure("run", "nano", "--prompt", "Hello", *flags)
    assert code == 2
    assert words in message


@pytest.mark.parametrize("verb", ["run", "bench", "eval"])
def test_a_bundle_is_no_checkpoint_for_pytorch(verb: str, tiny_bundle: Path) -> None:
    question = ["--prompt", "Hello"] if verb == "run" else []
    code, message = failure(verb, tiny_bundle, "--runtime", "torch", *question)
    assert code == 2
    assert "is a bundle, which PyTorch does not run" in message


@pytest.mark.parametrize("flag", ["--runtime", "--encoder-runtime"])
def test_verify_compares_with_pytorch_and_never_runs_it(flag: str) -> None:
    code, message = failure("verify", "nano", flag, "torch")
    assert code == 2
    assert "torch" in message


@pytest.mark.parametrize("flag", ["--runtime", "--encoder-runtime", "--decoder-runtime"])
def test_an_unknown_runtime_is_told_with_those_there_are(flag: str) -> None:
    code, message = failure("verify", "nano", flag, "open-vino")
    assert code == 3
    assert "no runtime named 'open-vino'" in message
    assert "Did you mean 'openvino'" in message


def test_targets_lists_every_runtime_and_pytorch() -> None:
    text = CliRunner().invoke(app, ["targets"], env={"COLUMNS": "200"}).stdout
    names = {line.split()[1] for line in text.splitlines() if line.startswith("runtime ")}
    assert {"onnxruntime", "openvino", "openvino-bf16", "torch"} <= names
