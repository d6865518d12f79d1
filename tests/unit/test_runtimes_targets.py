"""Bundles for several targets: what runs their halves unasked, and what is said where a runtime reads another one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from edgevlm.bench import tuning
from edgevlm.bench.tuning import candidates, choices_for, tune_bundle
from edgevlm.bundle.manifest import DecoderShape, Manifest, PartFile, RowTable
from edgevlm.bundle.read import Bundle
from edgevlm.core.errors import BenchmarkError, ConfigError, IntegrityError, MissingLibraryError, UnsupportedError
from edgevlm.runtimes import open as opening
from edgevlm.runtimes.choices import (
    CHECKERS,
    RUNTIME_OF,
    Choices,
    PartChoice,
    Wishes,
    part_for,
    target_of,
    usual_choices,
)
from edgevlm.runtimes.open import RUNTIMES, open_bundle
from edgevlm.runtimes.tuned import TunedMachine, read_tunes, write_tune
from edgevlm.runtimes.typed_on_cpu import TensorRtOnCpu
from edgevlm.shipped import find_bundle
from edgevlm.verify import Verification, gate, verify_all, verify_bundle
from edgevlm.verify.thresholds import BF16_STAGE, Combination, Computed

TYPED = ("fp16", "bf16")


class Typed:
    """A back end for the target tensorrt, which opens nothing."""

    target = "tensorrt"

    def __init__(self, **options: Any) -> None:
        self.options = options


class Plain:
    """A back end that does not say which target it reads."""

    def __init__(self, **options: Any) -> None:
        self.options = options


KNOWN: dict[str, Any] = {"onnxruntime": Plain, "tensorrt": Typed, "tensorrt-on-cpu": Typed}


def part(name: str, target: str, precision: str, **fields: Any) -> PartFile:
    file = f"{target}/{name}_{precision}.onnx"
    return PartFile(part=name, target=target, precision=precision, file=file, inputs=(), outputs=(), **fields)


def manifest(encoder: tuple[str, ...], decoder: tuple[str, ...], rows: tuple[str, ...] = ("onnx",)) -> Manifest:
    """Halves for these targets: the plain ones in fp32, the typed ones in fp16 and bf16."""
    precisions = {"onnx": ("fp32",), "tensorrt": TYPED}
    halves = {"vision_encoder": encoder, "decoder_model_merged": decoder}
    parts = [part(name, one, p) for name, held in halves.items() for one in held for p in precisions[one]]
    return Manifest(
        name="both",
        family="test",
        parts=(*parts, *(part("embed_tokens", one, "fp32") for one in rows)),
        image={},
        prompt={},
        num_vision_tokens=1,
        decoder=DecoderShape(1, 1, 1, 1, 1),
        max_context=1,
    )


ONLY = manifest(("tensorrt",), ("tensorrt",), ("tensorrt",))
BOTH = manifest(("onnx", "tensorrt"), ("tensorrt", "onnx"))


def names(choices: Choices) -> tuple[str, str]:
    return choices.encoder.runtime, choices.decoder.runtime


# -- what runs unasked ----------------------------------------------------------------------------------


def test_each_half_runs_on_the_runtime_of_the_first_target_that_holds_it() -> None:
    assert names(usual_choices(BOTH)) == ("onnxruntime", "onnxruntime")
    assert names(usual_choices(ONLY)) == ("tensorrt", "tensorrt")
    assert names(usual_choices(manifest(("tensorrt",), ("onnx",)))) == ("tensorrt", "onnxruntime")


def test_another_device_or_runtime_falls_back_to_what_is_usual_for_the_bundle() -> None:
    usual = usual_choices(ONLY)
    assert Wishes(device="cuda:1").over(usual, usual).decoder == PartChoice(runtime="tensorrt", device="cuda:1")
    assert names(Wishes(encoder_runtime="tensorrt-on-cpu").over(usual, usual)) == ("tensorrt-on-cpu", "tensorrt")


def test_every_target_with_a_default_has_a_runtime_that_reads_it() -> None:
    for target, runtime in RUNTIME_OF.items():
        assert target_of(RUNTIMES[runtime]) == target
    for runtime, checker in CHECKERS.items():
        assert target_of(RUNTIMES[checker]) == target_of(RUNTIMES[runtime])


# -- what a runtime reads -------------------------------------------------------------------------------


def test_a_runtime_for_another_target_is_told_which_one_would_do() -> None:
    words = r"vision_encoder was exported for tensorrt only.*onnxruntime reads onnx: --runtime tensorrt, or tensorrt-on"
    with pytest.raises(UnsupportedError, match=words):
        part_for(ONLY, "vision_encoder", target="onnx", precision=None, runtime="onnxruntime")
    with pytest.raises(UnsupportedError, match=r"has no precision 'int4'; it has fp16, bf16"):
        part_for(ONLY, "vision_encoder", target="tensorrt", precision="int4", runtime="tensorrt")


def test_an_onnx_bundle_is_refused_by_the_checking_runtime() -> None:
    with pytest.raises(UnsupportedError, match=r"exported for onnx only.*--runtime onnxruntime"):
        open_bundle("nano", "tensorrt-on-cpu")


@pytest.mark.parametrize("held", ["onnx", "tensorrt"])
def test_rows_of_either_target_serve_every_decoder(held: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(opening, "RUNTIMES", KNOWN)
    table = RowTable(file=f"{held}/embed_tokens_fp32.onnx", offset=0, dtype="float32", num_rows=1, num_columns=1)
    rows = part("embed_tokens", held, "fp32", table=table)
    whole = replace(BOTH, parts=(*(one for one in BOTH.parts if one.part != "embed_tokens"), rows))
    for runtime in ("onnxruntime", "tensorrt"):
        choices = Wishes(encoder_runtime="onnxruntime", decoder_runtime=runtime).over(Choices())
        halves = opening._Halves(Bundle(Path(), whole), choices)
        assert halves._beside("embed_tokens", halves._decoder) == rows
        assert halves._decoder.target == ("onnx" if runtime == "onnxruntime" else "tensorrt")


def test_the_checking_runtime_knows_two_devices() -> None:
    assert TensorRtOnCpu(device="CPU", threads=1).info["kv_cache"] == "rows"
    assert TensorRtOnCpu(device="in-place", threads=1).info["kv_cache"] == "in place"
    with pytest.raises(UnsupportedError, match="devices cpu and in-place"):
        TensorRtOnCpu(device="cuda")


# -- tune and tune.json ---------------------------------------------------------------------------------


def test_a_tuned_precision_is_one_that_its_runtime_reads(tmp_path: Path) -> None:
    for precision, words in (("fp16", None), ("fp32", "no decoder_model_merged in 'fp32', but fp16, bf16")):
        choices = Choices(decoder=PartChoice(runtime="tensorrt", precision=precision))
        tuned = TunedMachine(goal="ttft", choices={"ttft": choices})
        write_tune(tmp_path, tuned, key="here", manifest=BOTH, known=KNOWN)
        if words is None:
            assert read_tunes(tmp_path, BOTH, known=KNOWN).machines
        else:
            with pytest.raises(ConfigError, match=words):
                read_tunes(tmp_path, BOTH, known=KNOWN)


def test_candidates_are_what_each_runtime_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "RUNTIMES", KNOWN)
    found = [(one.runtime, one.precision) for one in candidates(BOTH, "encoder", ["onnxruntime", "tensorrt"])]
    assert found == [("onnxruntime", "fp32"), ("tensorrt", "fp16"), ("tensorrt", "bf16")]
    choice = PartChoice(runtime="tensorrt", precision="fp16", threads=2)
    assert choices_for("encoder", choice, BOTH).decoder == PartChoice(precision="fp32", threads=2)
    assert choices_for("encoder", choice, ONLY).decoder == choice


def test_tuning_tries_no_runtime_that_only_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(tuning, "RUNTIMES", KNOWN)
    monkeypatch.setattr(tuning, "_installed", lambda names, required: asked.extend(names) or [])
    with pytest.raises(BenchmarkError, match="no runtime here reads the encoder for onnx"):
        tune_bundle("nano", rounds=1)
    assert "onnxruntime" in asked
    assert not {*CHECKERS.values()} & {*asked}


# -- verify ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [IntegrityError("no engine"), MissingLibraryError("tensorrt", "pip install it")])
def test_verify_says_what_does_without_the_device(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any, **options: Any) -> None:
        raise error

    monkeypatch.setattr(gate, "open_chosen", fail)
    root = find_bundle("nano")
    with pytest.raises(type(error), match=rf"; without a device, `edgevlm verify {root} --runtime tensorrt-on-cpu`"):
        verify_bundle("nano", Wishes(runtime="tensorrt"))
    with pytest.raises(type(error), match=r"(no engine|it)$"):
        verify_bundle("nano")


def test_all_of_a_typed_bundle_is_its_own_precisions_and_the_decoders_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str | None, ...]] = []

    def note(path: Path, wishes: Wishes, *, check: bool) -> Verification | None:
        seen.append((wishes.encoder_precision, wishes.decoder_precision, wishes.device))
        return None

    def note_in_place(bundle: Bundle, choices: Choices, *, ask: bool) -> Verification | None:
        assert not ask
        seen.append((choices.encoder.precision, choices.decoder.precision, choices.decoder.device))
        if choices.decoder.precision == "bf16":
            raise UnsupportedError("this onnxruntime lacks an operator")
        return None

    decoders = [part("decoder_model_merged", "tensorrt", one, extra_files=("i",), in_place="i") for one in TYPED]
    rest = [one for one in ONLY.parts if one.part != "decoder_model_merged"]
    bundle = Bundle(Path("b"), replace(ONLY, parts=(*rest, *decoders)))
    monkeypatch.setattr(gate, "read_bundle", lambda path, check: bundle)
    monkeypatch.setattr(gate, "find_bundle", lambda path: Path(path))
    monkeypatch.setattr(gate, "verify_bundle", note)
    monkeypatch.setattr(gate, "verify_chosen", note_in_place)
    assert len(verify_all("b", Wishes(runtime="tensorrt-on-cpu"))) == 4  # the last one was told as a warning
    assert seen == [
        *[("fp16", "fp16", None), ("fp16", "bf16", None), ("bf16", "fp16", None)],
        *[("fp16", "fp16", "in-place"), ("fp16", "bf16", "in-place")],
    ]


def test_a_part_in_bf16_is_judged_as_one() -> None:
    bf16 = Computed(precision="bf16", runtime="tensorrt-on-cpu")
    assert (bf16.kind, bf16.in_bf16, bf16.rounds) == ("bf16", True, False)
    rules = Combination(encoder=bf16, decoder=bf16).rules()
    assert rules["image_features"] == rules["decode_logits"] == BF16_STAGE
