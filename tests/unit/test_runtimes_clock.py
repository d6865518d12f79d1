"""Where the time of an answer goes."""

from __future__ import annotations

import pytest

from edgevlm.runtimes import clock as module
from edgevlm.runtimes.clock import STAGES, StageClock

MS = 1_000_000


class SetTime:
    """A clock that a test sets."""

    def __init__(self) -> None:
        self.now = 0

    def __call__(self) -> int:
        return self.now

    def work(self, clock: StageClock, stage: str, milliseconds: int) -> None:
        with clock.stage(stage):
            self.now += milliseconds * MS


@pytest.fixture
def time(monkeypatch: pytest.MonkeyPatch) -> SetTime:
    set_time = SetTime()
    monkeypatch.setattr(module, "perf_counter_ns", set_time)
    return set_time


def test_both_first_token_times_and_the_pace_follow_their_definitions(time: SetTime) -> None:
    clock = StageClock()
    for stage, milliseconds in (("load_image", 1), ("preprocess", 2), ("vision", 4), ("embed", 8)):
        time.work(clock, stage, milliseconds)
    time.work(clock, "prefill", 16)
    time.work(clock, "sample", 32)
    clock.token()
    clock.text()
    for _ in range(2):
        time.work(clock, "decode", 5)
        time.work(clock, "sample", 1)
        clock.token()
        clock.text()
    timings = clock.timings()
    assert timings.ttft_user_ms == 63
    assert timings.ttft_engine_ms == 4 + 8 + 16 + 32
    assert timings.end_to_end_ms == 75
    assert timings.tpot_ms == (75 - 63) / 2
    assert timings.token_times_ms == (63, 69, 75)
    assert timings.stages_ms["sample"] == 34


def test_every_stage_is_in_the_record_even_at_zero() -> None:
    assert tuple(StageClock().timings().stages_ms) == STAGES


def test_an_empty_answer_has_its_first_text_at_the_end(time: SetTime) -> None:
    clock = StageClock()
    time.work(clock, "prefill", 3)
    assert (clock.timings().ttft_user_ms, clock.timings().tpot_ms) == (3, None)


def test_one_token_has_no_pace() -> None:
    clock = StageClock()
    clock.token()
    assert clock.timings().tpot_ms is None


def test_a_stage_that_raises_is_noted(time: SetTime) -> None:
    clock = StageClock()

    def fail(milliseconds: int) -> None:
        time.now += milliseconds * MS
        raise ValueError

    with pytest.raises(ValueError):
        clock.timed("vision", fail)(2)
    assert clock.timings().stages_ms["vision"] == 2
