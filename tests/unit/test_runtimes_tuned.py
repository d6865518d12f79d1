"""What was wished, what was tuned, and which of them counts."""

from __future__ import annotations

import json
import logging
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from edgevlm.bundle.manifest import DecoderShape, Manifest, PartFile
from edgevlm.bundle.read import Bundle
from edgevlm.core.errors import ConfigError, MissingLibraryError, UsageError
from edgevlm.core.hardware import Cpu, Gpu, Hardware, Memory
from edgevlm.core.jetson import Jetson
from edgevlm.runtimes.choices import Choices, PartChoice, Wishes
from edgevlm.runtimes.tuned import (
    TUNE_FILE,
    TunedMachine,
    machine_key,
    read_tunes,
    surroundings,
    tuned_choices,
    write_tune,
)
from edgevlm.shipped import find_bundle, require_writable

ENCODER = PartChoice(runtime="other", precision="int8", threads=3)
DECODER = PartChoice(runtime="onnxruntime", precision="int4-b128", threads=2)
TUNED = Choices(encoder=ENCODER, decoder=DECODER)


def installed(**options: Any) -> Any:
    """A back end whose library is there."""
    return options


def missing(**options: Any) -> Any:
    """A back end whose library is not."""
    raise MissingLibraryError("other", "pip install other")


KNOWN: dict[str, Any] = {"onnxruntime": installed, "other": installed}


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    precisions = {"vision_encoder": ("fp32", "int8"), "embed_tokens": ("fp32",)}
    precisions["decoder_model_merged"] = ("fp32", "int4-b128")
    parts = [
        PartFile(part=name, target="onnx", precision=precision, file=f"{name}_{precision}.onnx", inputs=(), outputs=())
        for name, all_of_it in precisions.items()
        for precision in all_of_it
    ]
    manifest = Manifest(
        name="tuned",
        family="test",
        parts=tuple(parts),
        image={},
        prompt={},
        num_vision_tokens=1,
        decoder=DecoderShape(1, 1, 1, 1, 1),
        max_context=1,
    )
    return Bundle(tmp_path, manifest)


def tune(bundle: Bundle, key: str | None = None, **choices: Choices) -> TunedMachine:
    found_with = surroundings(bundle.root)
    tuned = TunedMachine(holds_for=found_with, goal="ttft", choices={"ttft": TUNED, **choices}, date="2026-01-01")
    write_tune(bundle.root, tuned, key=key or machine_key(), manifest=bundle.manifest, known=KNOWN)
    return tuned


# -- wishes ---------------------------------------------------------------------------------------------


def test_without_a_wish_everything_stays_as_it_was_tuned() -> None:
    assert Wishes().over(TUNED) == TUNED


def test_a_runtime_for_both_halves_gives_way_to_that_of_one() -> None:
    wished = Wishes(runtime="a", encoder_runtime="b").over(Choices())
    assert (wished.encoder.runtime, wished.decoder.runtime) == ("b", "a")


def test_threads_and_precisions_replace_the_tuned_ones() -> None:
    wished = Wishes(threads=1, decoder_precision="fp32").over(TUNED)
    assert wished.encoder == replace(ENCODER, threads=1)
    assert wished.decoder == replace(DECODER, threads=1, precision="fp32")


def test_another_runtime_or_device_does_not_inherit_what_was_tuned() -> None:
    assert Wishes(encoder_runtime="onnxruntime").over(TUNED).encoder == PartChoice()
    assert Wishes(device="CPU").over(TUNED).decoder == replace(DECODER, device="CPU")  # where it was tuned
    assert Wishes(device="cuda").over(TUNED).decoder == PartChoice(device="cuda")
    assert Wishes(decoder_runtime="onnxruntime").over(TUNED).decoder == DECODER  # it is the tuned one


def test_a_goal_that_nobody_knows_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"no goal named 'througput'.*Did you mean 'throughput'"):
        Wishes(optimize="througput")


@pytest.mark.parametrize("threads", [0, -1, 257])
def test_threads_out_of_range_are_refused(threads: int) -> None:
    for make in (Wishes, PartChoice):
        with pytest.raises(ConfigError, match="threads must be 1 to 256"):
            make(threads=threads)


# -- tune.json ------------------------------------------------------------------------------------------


def test_what_was_written_is_found_again_on_this_machine(bundle: Bundle) -> None:
    tune(bundle, throughput=Choices())
    assert tuned_choices(bundle, None, known=KNOWN) == TUNED
    assert tuned_choices(bundle, "throughput", known=KNOWN) == Choices()


def test_other_machines_keep_what_was_found_for_them(bundle: Bundle) -> None:
    theirs = tune(bundle, key="another machine")
    assert tuned_choices(bundle, None, known=KNOWN) is None
    ours = tune(bundle)
    machines = read_tunes(bundle.root, bundle.manifest, known=KNOWN).machines
    assert machines == {"another machine": theirs, machine_key(): ours}


@pytest.mark.parametrize("goal", ["throughput", "memory"])
def test_a_goal_that_nothing_was_tuned_for_is_an_error(bundle: Bundle, goal: str) -> None:
    with pytest.raises(UsageError, match=f"nothing is tuned for {goal} on this machine: run `edgevlm tune"):
        tuned_choices(bundle, goal, known=KNOWN)
    tune(bundle)
    with pytest.raises(UsageError, match=f"nothing is tuned for {goal}"):
        tuned_choices(bundle, goal, known=KNOWN)


def damage(bundle: Bundle, **machine: Any) -> None:
    tune(bundle)
    file = bundle.root / TUNE_FILE
    whole = json.loads(file.read_text())
    whole["machines"][machine_key()].update(machine)
    file.write_text(json.dumps(whole))


@pytest.mark.parametrize(
    ("machine", "words"),
    [
        ({"choices": {"ttft": {"encoder": {"runtime": "evil:code"}}}}, "no runtime named 'evil:code'"),
        ({"choices": {"ttft": {"encoder": {"precision": "int2"}}}}, "no vision_encoder in 'int2', but fp32, int8"),
        ({"choices": {"ttft": {"decoder": {"precision": "int8"}}}}, "no decoder_model_merged in 'int8'"),
        ({"choices": {"ttft": {"encoder": {"device": "cuda"}}}}, "may not choose a device, found 'cuda'"),
        ({"choices": {"ttft": {"decoder": {"threads": 0}}}}, "threads must be 1 to 256"),
        ({"choices": {"ttft": {"decoder": {"threads": "2"}}}}, "threads must be int"),
        ({"choices": {"ttft": {"decoder": {"file": "../x"}}}}, "no key named 'file'"),
        ({"choices": {"speed": {}}}, "no goal named 'speed'"),
        ({"choices": {}}, "says nothing about it"),
        ({"goal": "memory"}, "says nothing about it"),
        ({"surprise": 1}, "no key named 'surprise'"),
    ],
)
def test_a_damaged_file_is_one_warning_and_counts_for_nothing(
    bundle: Bundle, caplog: pytest.LogCaptureFixture, machine: dict[str, Any], words: str
) -> None:
    damage(bundle, **machine)
    with caplog.at_level(logging.WARNING):
        assert tuned_choices(bundle, None, known=KNOWN) is None
    assert [words in record.getMessage() for record in caplog.records] == [True]


@pytest.mark.parametrize("name", ["edgevlm", "onnxruntime", "cpu features", "bundle"])
def test_an_entry_holds_only_where_it_was_found(bundle: Bundle, caplog: pytest.LogCaptureFixture, name: str) -> None:
    damage(bundle, holds_for={**surroundings(bundle.root), name: "another"})
    with caplog.at_level(logging.WARNING):
        assert tuned_choices(bundle, None, known=KNOWN) is None
    assert [record.getMessage().partition(f"another {name};")[1] != "" for record in caplog.records] == [True]
    assert "`edgevlm tune` writes it again" in caplog.text


def test_an_entry_that_does_not_say_where_it_was_found_counts_for_nothing(bundle: Bundle) -> None:
    damage(bundle, holds_for={})
    assert tuned_choices(bundle, None, known=KNOWN) is None


def test_another_bundle_in_the_folder_must_be_tuned_again(bundle: Bundle) -> None:
    tune(bundle)
    (bundle.root / "SHA256SUMS").write_text("another")
    assert tuned_choices(bundle, None, known=KNOWN) is None


def test_a_folder_that_cannot_be_written_is_told_beforehand(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    require_writable(bundle.root, "tune.json", instead="tune a copy")
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write anywhere
    with pytest.raises(UsageError, match=r"may not be written, so no tune\.json can lie there: tune a copy"):
        require_writable(bundle.root, "tune.json", instead="tune a copy")


def test_what_the_package_ships_is_not_written_to() -> None:
    with pytest.raises(UsageError, match=r"nano.bundle belongs to the package: tune a copy"):
        require_writable(find_bundle("nano"), "tune.json", instead="tune a copy")


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"schema": 2}', b"\xff", b'{"schema": 1, "machines": 3}'])
def test_a_file_that_is_no_such_file_is_ignored_with_a_warning(
    bundle: Bundle, caplog: pytest.LogCaptureFixture, content: bytes
) -> None:
    (bundle.root / TUNE_FILE).write_bytes(content)
    with caplog.at_level(logging.WARNING):
        assert tuned_choices(bundle, None, known=KNOWN) is None
    assert len(caplog.records) == 1
    tune(bundle)  # and it is replaced
    assert tuned_choices(bundle, None, known=KNOWN) == TUNED


def test_a_choice_whose_library_is_gone_is_ignored_with_a_warning(
    bundle: Bundle, caplog: pytest.LogCaptureFixture
) -> None:
    tune(bundle, throughput=Choices())
    with caplog.at_level(logging.WARNING):
        assert tuned_choices(bundle, None, known={**KNOWN, "other": missing}) is None
    assert "pip install other" in caplog.text
    assert tuned_choices(bundle, "throughput", known={**KNOWN, "other": missing}) == Choices()


def test_a_machine_is_known_by_what_decides_its_speed() -> None:
    cpu = Cpu(model="A CPU", features=(), physical_cores=4, logical_cores=8, usable_cores=2.5)
    machine = Hardware(
        system="Linux",
        architecture="x",
        kernel="6",
        board=None,
        cpu=cpu,
        memory=Memory(total_bytes=None, available_bytes=None),
        gpus=(),
        jetson=None,
    )
    assert machine_key(machine).startswith("A CPU, 2 of 8 cores, Linux, ")
    jetson = Jetson(model="Orin", l4t=None, jetpack=None, power_mode="15W", cma_total_bytes=None, cma_free_bytes=None)
    others = [
        replace(machine, cpu=replace(cpu, usable_cores=8.0)),
        replace(machine, gpus=(Gpu(name="A GPU", vendor="?"),)),
        replace(machine, jetson=jetson),
        replace(machine, jetson=replace(jetson, power_mode="MAXN")),
    ]
    assert len({machine_key(one) for one in (machine, *others)}) == 5
    assert machine_key(replace(machine, kernel="7")) == machine_key(machine)
