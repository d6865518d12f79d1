"""The comparison with other projects: order of turns, prompts, records, ratios, and the process that stands still."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from time import sleep

import pytest

from bench.peers import artifacts, checkpoint, environments, record, tables
from bench.peers.engines import CEILINGS, ENGINES, Engine
from bench.peers.makers.gguf_files import gguf_name
from bench.peers.processes import Worker, WorkerLostError
from bench.peers.rounds import Plan, Section, Series, prompt_ids, rotated

ECHO = """
import json, sys
print(json.dumps({"can": ["echo"]}), flush=True)
for line in sys.stdin:
    if json.loads(line) == "end":
        sys.exit("it was told to")
    print(json.dumps({"echo": json.loads(line)}), flush=True)
"""


def test_every_engine_begins_as_often_as_any_other() -> None:
    names = ["a", "b", "c", "d"]
    firsts = Counter(rotated(names, number)[0] for number in range(8))
    assert firsts == {"a": 2, "b": 2, "c": 2, "d": 2}
    assert all(sorted(rotated(names, number)) == names for number in range(8))


def test_neighbours_change_places_from_round_to_round() -> None:
    assert rotated(["a", "b", "c"], 0) == ["a", "b", "c"]
    assert rotated(["a", "b", "c"], 1) == ["c", "b", "a"]
    assert rotated(["a", "b", "c"], 2) == ["b", "c", "a"]


def test_prompts_differ_between_rounds_and_not_between_runs() -> None:
    assert prompt_ids(0, 8) == prompt_ids(0, 8) != prompt_ids(1, 8)
    assert max(prompt_ids(0, 5000)) < min(checkpoint.SPECIAL.values())


def test_text_model_has_the_names_of_qwen2() -> None:
    assert (
        checkpoint.text_name("model.language_model.layers.3.mlp.up_proj.weight") == "model.layers.3.mlp.up_proj.weight"
    )
    assert checkpoint.text_name("lm_head.weight") == "lm_head.weight"
    assert checkpoint.text_name("model.multi_modal_projector.linear_1.bias") == ""


def test_gguf_has_a_name_for_every_kind_of_tensor() -> None:
    assert gguf_name("model.layers.3.self_attn.q_proj.bias") == "blk.3.attn_q.bias"
    assert gguf_name("model.layers.0.post_attention_layernorm.weight") == "blk.0.ffn_norm.weight"
    assert gguf_name("model.embed_tokens.weight") == "token_embd.weight"


def test_header_of_weights_is_what_safetensors_reads(tmp_path: Path) -> None:
    from safetensors.numpy import load_file

    shapes: dict[str, tuple[int, ...]] = {"a": (2, 3), "b": (4,)}
    (tmp_path / "x.safetensors").write_bytes(checkpoint.header_of(shapes) + bytes(2 * 10))
    assert {name: tensor.shape for name, tensor in load_file(tmp_path / "x.safetensors").items()} == shapes


def test_engines_have_names_of_their_own_and_environments_that_exist() -> None:
    names = Counter((engine.section, engine.name) for engine in ENGINES)
    assert set(names.values()) == {1}
    known = {environments.OWN, *environments.ENVIRONMENTS}
    assert {engine.environment for engine in ENGINES} <= known
    assert {artifact.environment for artifact in artifacts.ARTIFACTS} <= known


def test_every_engine_reads_a_file_that_something_makes() -> None:
    made = {artifact.name for artifact in artifacts.ARTIFACTS}
    assert {Path(engine.model).parts[1] for engine in ENGINES} <= made


def test_every_claim_names_engines_that_are_measured() -> None:
    measured = {(engine.section, engine.name) for engine in ENGINES}
    named = {(claim.section, name) for claim in tables.CLAIMS for name in (*claim.ours, claim.theirs)}
    assert named - measured == set()


def test_an_engine_says_what_it_lacks(tmp_path: Path) -> None:
    engine = Engine(name="x", section="text", worker="llama_cpp", model="weights/x.gguf")
    assert engine.lacks(tmp_path) == "no weights/x.gguf: compare.py weights"
    peer = Engine(name="x", section="text", worker="llama_cpp", model="weights/x.gguf", environment="llama")
    assert peer.lacks(tmp_path) == "no environment llama: compare.py setup"
    assert CEILINGS.lacks(tmp_path) is None


@pytest.fixture
def measured() -> record.Record:
    """Decode of ours takes 10 ms, of theirs 20; the machine reads 50 GB/s."""
    series = {
        tables.INT4: Series("text", {"read_bytes": 250_000_000}, {"step_ms": [10.0] * 6, "prefill_ms": [100.0] * 6}),
        "llama.cpp Q4_0": Series("text", {"read_bytes": None}, {"step_ms": [20.0] * 6, "prefill_ms": [300.0] * 6}),
        CEILINGS.name: Series("", {}, {"read_gb_per_s": [50.0] * 6}),
    }
    section = Section(series=series, left_out={"optimum-onnx fp32": "no file"}, num_rounds=6)
    found = record.begin(Plan(rounds=6), {"question_tokens": 32, "prompt_ids": [1, 2]}, {"passed": True})
    found.sections["text"] = section
    return found


def test_ratio_is_theirs_over_ours(measured: record.Record) -> None:
    found = tables.ratio_of(measured, tables.CLAIMS[0])
    assert found is not None
    name, ratio = found
    assert (name, ratio.value, ratio.low, ratio.high) == (tables.INT4, 2.0, 2.0, 2.0)


def test_table_shows_rates_the_share_of_bandwidth_and_who_did_not_run(measured: record.Record) -> None:
    text = tables.to_markdown(measured)
    ours = next(line for line in text.splitlines() if line.startswith(f"| {tables.INT4} ") and "250" in line)
    assert "2560.0" in ours  # 256 tokens in 100 ms
    assert "100.0" in ours
    assert "50 %" in ours  # 250 MB at 50 GB/s take 5 ms of the 10
    assert "- not measured: optimum-onnx fp32: no file" in text
    assert "gate" not in text


def test_record_is_the_same_after_writing_and_reading(measured: record.Record, tmp_path: Path) -> None:
    record.write_record(measured, tmp_path / "run.json")
    assert record.read_record(tmp_path / "run.json") == measured
    (tmp_path / "old.json").write_text(json.dumps({"schema": 0}))
    with pytest.raises(SystemExit, match="measure again"):
        record.read_record(tmp_path / "old.json")


@pytest.fixture
def echo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Worker]:
    """A worker that answers with what it was asked."""
    interpreter = tmp_path / "python"
    interpreter.write_text(f"#!{sys.executable}\n{ECHO}")
    interpreter.chmod(0o755)
    monkeypatch.setattr("bench.peers.processes.python_of", lambda name, folder: interpreter)
    worker = Worker(Engine(name="echo", section="text", worker="echo", model="x"), tmp_path, threads=1)
    yield worker
    worker.close()


def state_of(worker: Worker) -> str:
    """The letter that the system shows for a process: T is stopped."""
    return Path(f"/proc/{worker._process.pid}/stat").read_text().rpartition(")")[2].split()[0]


def stands_still(worker: Worker) -> bool:
    """Whether the process is stopped within a second."""
    for _ in range(100):
        if state_of(worker) == "T":
            return True
        sleep(0.01)
    return False


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="only Linux says whether a process is stopped")
def test_worker_stands_still_except_while_it_answers(echo: Worker) -> None:
    assert echo.about == {"can": ["echo"]}
    assert stands_still(echo)
    assert echo.ask({"do": "x"}) == {"echo": {"do": "x"}}
    assert stands_still(echo)


def test_lost_worker_says_what_it_said_last(echo: Worker) -> None:
    with pytest.raises(WorkerLostError, match=r"echo ended; .* it was told to"):
        echo.ask("end")  # type: ignore[arg-type]


def test_closing_ends_a_process_that_stands_still(echo: Worker) -> None:
    echo.close()
    with pytest.raises(ProcessLookupError):
        os.kill(echo._process.pid, signal.SIGCONT)
