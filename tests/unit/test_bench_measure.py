"""Measuring a model whose every answer takes a known time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain, islice, repeat
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from edgevlm.bench import machine
from edgevlm.bench.measurement import Repetition
from edgevlm.bench.measuring import accounted_bytes, measure
from edgevlm.bench.memory import memory_now, watch_peak
from edgevlm.bench.workload import is_settled, prompt_of_length, repetition, scene_pictures, warm_up
from edgevlm.bundle import read
from edgevlm.bundle.manifest import DecoderShape, Manifest, PartFile, RowTable, TensorSpec
from edgevlm.core.errors import BenchmarkError, UsageError
from edgevlm.core.hardware import probe
from edgevlm.runtimes.answer import Answer
from edgevlm.runtimes.clock import STAGES, Timings


class TimedVlm:
    """The n-th answer takes ``first_ms[n]`` (the last one for ever) to the first of its ``tokens`` tokens."""

    name, max_context = "timed", 64
    info: dict[str, Any] = {"runtime": "fake", "threads": 2}  # noqa: RUF012

    def __init__(self, first_ms: Sequence[float] = (10.0,), tokens: int | None = None, cached: bool = False) -> None:
        self.times: Iterator[float] = chain(first_ms, repeat(first_ms[-1]))
        self.tokens, self.cached = tokens, cached
        self.asked: list[tuple[Any, str, bool]] = []
        self.processor = SimpleNamespace(
            image_spec=SimpleNamespace(height=32, width=32, split=None),
            prepare=lambda image: SimpleNamespace(grid=(1, 2) if min(image.shape[:2]) == 32 else (9, 9)),
            input_ids=self.count_words,
        )

    def count_words(self, messages: Any, grids: Any) -> list[int]:
        num_tiles = sum(rows * columns for rows, columns in grids)
        return [0] * (8 * num_tiles + len(messages[0]["content"][1]["text"].split()))

    def ask(self, image: Any, prompt: str, *, max_tokens: int, use_image_cache: bool, ignore_eos: bool) -> Answer:
        self.asked.append((image, prompt, use_image_cache))
        count = max_tokens if self.tokens is None else self.tokens
        return answer(next(self.times), count, self.cached)


def answer(first_ms: float, count: int, cached: bool = False) -> Answer:
    timings = Timings(
        stages_ms={**dict.fromkeys(STAGES, 0.0), "vision": 4.0, "decode": 2.0 * (count - 1)},
        ttft_user_ms=first_ms,
        ttft_engine_ms=first_ms - 3,
        tpot_ms=2.0 if count > 1 else None,
        end_to_end_ms=first_ms + 2.0 * max(0, count - 1),
        token_times_ms=tuple(first_ms + 2.0 * i for i in range(count)),
    )
    return Answer(
        text="x" * count,
        token_ids=(7,) * count,
        finish_reason="length",
        num_prompt_tokens=12,
        num_vision_tokens=8,
        num_cached_tokens=0,
        image_from_cache=cached,
        timings=timings,
    )


def run(vlm: TimedVlm, **options: Any) -> Any:
    return measure(vlm, **options)  # type: ignore[arg-type]


def test_every_repetition_and_warm_up_sees_a_picture_of_its_own() -> None:
    vlm = TimedVlm()
    measured = run(vlm, repetitions=5)
    pictures = [image for image, _, _ in vlm.asked]
    assert len(set(pictures)) == len(pictures) == 3 + 5 + 1  # warm-up, repetitions, memory
    assert measured.workload.num_distinct_images == 5
    assert all(use_cache for _, _, use_cache in vlm.asked)


def test_figures_are_what_the_clock_said() -> None:
    measured = run(TimedVlm(), repetitions=6, max_tokens=4)
    medians = {name: one.median for name, one in measured.summaries().items()}
    assert medians["ttft_user_ms"] == 10
    assert medians["ttft_engine_ms"] == 7
    assert medians["tpot_ms"] == 2
    assert medians["end_to_end_ms"] == 16
    assert medians["stage.vision_ms"] == 4
    assert measured.summaries()["token_gap_ms"].n == 6 * 3


def test_a_given_image_is_asked_again_with_the_cache_off_and_says_so(tmp_path: Path) -> None:
    vlm = TimedVlm()
    measured = run(vlm, image=tmp_path / "kitchen.jpg", repetitions=4)
    assert {use_cache for _, _, use_cache in vlm.asked} == {False}
    assert measured.workload.images == "kitchen.jpg, image cache off"
    assert "only 1 different images, with the image cache off" in measured.notes()
    assert measured.workload.regime == "warm-given-images"


@pytest.mark.parametrize(("num_images", "regime"), [(6, "warm-given-images"), (7, "warm-new-image")])
def test_given_images_are_new_ones_if_warm_up_and_repetitions_see_none_twice(num_images: int, regime: str) -> None:
    images = [f"{i}.png" for i in range(num_images)]
    assert run(TimedVlm(), image=images, repetitions=4).workload.regime == regime  # after 3 warm-ups
    assert run(TimedVlm(), image=["0.png"] * 9, repetitions=4).workload.regime == "warm-given-images"


def test_given_images_take_turns() -> None:
    vlm = TimedVlm()
    images = [np.full((2, 2, 3), i, np.uint8) for i in range(2)]
    run(vlm, image=images, repetitions=1)
    assert [int(image[0, 0, 0]) for image, _, _ in vlm.asked] == [0, 1, 0, 1, 0]


def test_a_picture_from_the_cache_makes_the_benchmark_invalid() -> None:
    with pytest.raises(BenchmarkError, match="image cache"):
        run(TimedVlm(cached=True))


def test_a_wrong_golden_answer_makes_the_benchmark_invalid_before_it_starts() -> None:
    vlm = TimedVlm()
    with pytest.raises(BenchmarkError, match="said cat, expected dog") as error:
        run(vlm, check=lambda _: "said cat, expected dog")
    assert error.value.exit_code == 9
    assert vlm.asked == []


def test_a_right_golden_answer_is_recorded() -> None:
    assert run(TimedVlm(), repetitions=1, check=lambda _: None).conditions.golden == "matched"
    assert "the golden answer was not checked" in run(TimedVlm(), repetitions=1).notes()


def test_answers_that_end_early_are_counted_and_noted() -> None:
    measured = run(TimedVlm(tokens=2), repetitions=3, max_tokens=32)
    assert measured.num_new_tokens() == (2, 2)
    assert "answers ended early: 2 to 2 tokens instead of 32" in measured.notes()


def test_an_answer_of_one_token_has_no_tpot() -> None:
    measured = run(TimedVlm(tokens=1), repetitions=3)
    assert "tpot_ms" not in measured.summaries()
    assert "token_gap_ms" not in measured.summaries()


def test_an_empty_answer_is_not_timed() -> None:
    with pytest.raises(BenchmarkError, match="empty"):
        run(TimedVlm(tokens=0))


def test_progress_is_told_once_per_repetition() -> None:
    calls: list[None] = []
    run(TimedVlm(), repetitions=4, on_repetition=lambda: calls.append(None))
    assert len(calls) == 4


def test_no_repetitions_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match="repetitions"):
        run(TimedVlm(), repetitions=0)


def test_conditions_name_device_versions_and_command() -> None:
    where = run(TimedVlm(), repetitions=1, command="edgevlm bench nano").conditions
    assert where.command == "edgevlm bench nano"
    assert where.device["name"]
    assert "numpy" in where.versions
    assert where.runtime == {"runtime": "fake", "threads": 2}


def test_warm_up_ends_when_three_medians_agree() -> None:
    times = iter([50.0, 20.0, 10.0, 10.0, 10.1, 10.0, 10.0])
    done = warm_up(lambda: next_repetition(next(times)))
    assert (done.num_repetitions, done.settled) == (6, True)  # medians 20, 10, 10.1 -> 10, 10.1, 10


def test_warm_up_takes_at_least_three_and_at_most_twenty() -> None:
    assert warm_up(lambda: next_repetition(10.0)).num_repetitions == 3
    growing = iter(range(1, 100))
    done = warm_up(lambda: next_repetition(2.0 ** next(growing)))
    assert (done.num_repetitions, done.settled) == (20, False)


def next_repetition(first_ms: float) -> Repetition:
    return repetition("scene", answer(first_ms, 1))


def test_settled_means_within_two_per_cent() -> None:
    assert is_settled([100.0, 100.0, 102.0, 102.0, 102.0])
    assert not is_settled([100.0, 100.0, 103.0, 103.0])


def test_a_prompt_is_lengthened_to_the_asked_number_of_tokens() -> None:
    vlm: Any = TimedVlm()
    assert len(prompt_of_length(vlm, 20).split()) == 12
    assert prompt_of_length(vlm, 11) == "Describe the picture."


def test_a_prompt_is_lengthened_with_the_tiles_of_a_scene_in_mind() -> None:
    vlm: Any = TimedVlm()
    vlm.processor.image_spec.split = "tiles"
    assert len(prompt_of_length(vlm, 20).split()) == 4
    with pytest.raises(UsageError, match=r"needs 19 .* holds 64"):
        prompt_of_length(vlm, 18)


def test_a_prompt_is_filled_with_words_that_cost_one_token() -> None:
    vlm: Any = TimedVlm()
    costs = {"again": 5, "the": 3, "is": 1}
    vlm.processor.input_ids = lambda messages, grids: [
        0 for word in messages[0]["content"][1]["text"].split() for _ in range(costs.get(word, 2))
    ]
    assert prompt_of_length(vlm, 10) == "Describe the picture." + " is" * 3


@pytest.mark.parametrize("num_tokens", [0, 10, 65])
def test_a_prompt_length_that_cannot_be_is_refused_with_the_limits(num_tokens: int) -> None:
    vlm: Any = TimedVlm()
    with pytest.raises(UsageError, match=r"needs 11 .* holds 64"):
        prompt_of_length(vlm, num_tokens)


def test_scenes_are_the_same_in_every_run() -> None:
    first, again = (list(islice(scene_pictures(16), 2)) for _ in range(2))
    assert first == again
    assert first[0].source != first[1].source


def test_memory_falls_back_to_rss_where_there_is_no_pss(tmp_path: Path) -> None:
    rollup = tmp_path / "smaps_rollup"
    assert memory_now(rollup)[0] == "RSS"
    rollup.write_text("55d0-7ffd ---p 00000000 00:00 0 [rollup]\nRss: 100 kB\nPss: 60 kB\n")
    assert memory_now(rollup) == ("PSS", 60 * 1024)


def test_the_peak_covers_what_the_block_allocated() -> None:
    with watch_peak() as peak:
        before, block = peak.peak_bytes, np.ones(256 << 20, np.uint8)  # far more than other tests leave to be freed
        peak.sample()
    assert peak.peak_bytes >= before + block.nbytes // 2
    assert peak.num_samples >= 3


def test_clocks_are_read_in_order_and_missing_ones_are_no_error(tmp_path: Path) -> None:
    for cpu, khz in (("cpu10", 1_000_000), ("cpu2", 2_400_000)):
        (tmp_path / cpu / "cpufreq").mkdir(parents=True)
        (tmp_path / cpu / "cpufreq" / "scaling_cur_freq").write_text(f"{khz}\n")
    assert machine.clocks_mhz(tmp_path) == (2400.0, 1000.0)
    assert machine.clocks_mhz(tmp_path / "none") == ()


def test_a_device_is_described_in_plain_values() -> None:
    values = machine.device(probe())
    assert machine.name_of(values) == values["name"]
    assert all(isinstance(value, (str, int, float)) for value in values.values())


def test_other_load_is_a_share() -> None:
    with machine.watch_other_load() as load:
        sum(range(100_000))
    assert load.share is None or 0 <= load.share <= 1


@pytest.mark.parametrize(
    ("precision", "computes_in", "weights", "number"),
    [("fp32", None, 1110, 4), ("fp16", None, 1120, 2), ("fp32", "f32", 1110, 4), ("fp32", "bf16", 1110, 2)],
)
def test_memory_is_accounted_for_what_was_opened(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, precision: str, computes_in: str | None, weights: int, number: int
) -> None:
    def part(name: str, precision: str, dtype: str = "float32", table: RowTable | None = None) -> PartFile:
        past = (TensorSpec("past_key_values.0.key", dtype, (1, 2, "past", 8)),) if name.startswith("decoder") else ()
        extra = (table.file,) if table else ()
        file = f"{name}_{precision}"
        return PartFile(
            part=name,
            target="onnx",
            file=file,
            precision=precision,
            inputs=past,
            outputs=(),
            table=table,
            extra_files=extra,
        )

    rows = RowTable(file="rows", offset=0, dtype="float32", num_rows=5, num_columns=5)
    decoders = (part("decoder_model_merged", "fp32"), part("decoder_model_merged", "fp16", "float16"))
    manifest = Manifest(
        name="several",
        family="test",
        parts=(part("vision_encoder", "fp32"), part("embed_tokens", "fp32", table=rows), *decoders),
        image={},
        prompt={},
        num_vision_tokens=1,
        decoder=DecoderShape(3, 2, 8, 16, 32),
        max_context=10,
        file_bytes={
            "vision_encoder_fp32": 1000,
            "rows": 100,
            "embed_tokens_fp32": 7,
            "decoder_model_merged_fp32": 10,
            "decoder_model_merged_fp16": 20,
        },
    )
    monkeypatch.setattr("edgevlm.bench.measuring.read_bundle", lambda *_, **__: read.Bundle(tmp_path, manifest))
    opened = {"vision_encoder": "fp32", "embed_tokens": "fp32", "decoder_model_merged": precision}
    info = {"bundle": str(tmp_path), "precisions": opened, "computes_in": computes_in}
    shape = manifest.decoder
    numbers = 2 * shape.num_layers * shape.num_key_value_heads * 10 * shape.head_size
    assert accounted_bytes(info) == (weights, numbers * number)


def test_a_model_that_is_no_bundle_accounts_for_nothing() -> None:
    assert accounted_bytes({"runtime": "torch"}) == (None, None)
