"""The comparison with other projects: order of turns, prompts, records, ratios, and the process that stands still."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from time import sleep

import pytest

from bench.peers import artifacts, bundles, checkpoint, environments, record, rounds, tables
from bench.peers.cold_starts import FIGURES, ColdStarts
from bench.peers.engines import CEILINGS, ENGINES, Engine
from bench.peers.makers.gguf_files import gguf_name
from bench.peers.makers.verified import verdict
from bench.peers.processes import Worker, WorkerLostError
from bench.peers.rounds import Plan, Section, Series, prompt_ids, rotated
from bench.peers.workers import edgevlm_bundle
from edgevlm.shipped import find_bundle

SERVE = """
import json, signal, subprocess, sys
serve = "from bench.peers.workers.serving import Serving, serve; serve(lambda arguments: Serving({}, {}))"
worker = subprocess.Popen([sys.executable, "-c", serve, "{}"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
worker.stdout.readline()
worker.send_signal(signal.SIGSTOP)
print(worker.pid, flush=True)
signal.pause()
"""
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
    named = {(claim.section, name) for claim in tables.CLAIMS for name in (*claim.ours, *claim.theirs)}
    assert named - measured == set()


def test_an_engine_says_what_it_lacks(tmp_path: Path) -> None:
    engine = Engine(name="x", section="text", worker="llama_cpp", model="weights/x.gguf")
    assert engine.lacks(tmp_path) == "no weights/x.gguf: compare.py weights"
    peer = Engine(name="x", section="text", worker="llama_cpp", model="weights/x.gguf", environment="llama")
    assert peer.lacks(tmp_path) == "no environment llama: compare.py setup"
    assert CEILINGS.lacks(tmp_path) is None


PASSED = {"passed": True, "variants_passed": [True], "verdicts": {tables.INT4: ""}}


@pytest.fixture
def measured() -> record.Record:
    """Decode of ours takes 10 ms, of theirs 20 and 25; the machine reads 50 GB/s."""
    series = {
        tables.INT4: Series("text", {"read_bytes": 250_000_000}, {"step_ms": [10.0] * 6, "prefill_ms": [100.0] * 6}),
        "llama.cpp Q4_0": Series(
            "text", {"read_bytes": 300_000_000}, {"step_ms": [20.0] * 6, "prefill_ms": [300.0] * 6}
        ),
        "llama.cpp Q4_K_M": Series("text", {"read_bytes": None}, {"step_ms": [25.0] * 6, "prefill_ms": [300.0] * 6}),
        CEILINGS.name: Series("", {}, {"read_gb_per_s": [50.0] * 6}),
    }
    section = Section(series=series, left_out={"optimum-onnx fp32": "no file"}, num_rounds=6)
    found = record.begin(Plan(rounds=6), {"question_tokens": 32, "prompt_ids": [1, 2]}, PASSED)
    found.sections["text"] = section
    return found


def test_ratio_is_theirs_over_ours(measured: record.Record) -> None:
    found = tables.ratio_of(measured, tables.CLAIMS[0])
    assert found is not None
    ours, theirs, ratio = found
    assert (ours, theirs) == (tables.INT4, "llama.cpp Q4_0")
    assert (ratio.value, ratio.low, ratio.high) == (2.0, 2.0, 2.0)


def test_fastest_of_theirs_counts(measured: record.Record) -> None:
    both = ("llama.cpp Q4_K_M", "llama.cpp Q4_0", "onnxruntime-genai int4")  # the last one did not run
    found = tables.ratio_of(measured, replace(tables.CLAIMS[0], theirs=both))
    assert found is not None
    assert (found[1], found[2].value) == ("llama.cpp Q4_0", 2.0)


def test_ratio_per_byte_takes_the_smaller_file_off_ours(measured: record.Record) -> None:
    found = tables.ratio_of(measured, replace(tables.CLAIMS[0], per_byte=True))
    assert found is not None
    assert (found[2].value, found[2].low) == pytest.approx((2.0 * 250 / 300,) * 2)
    unknown = replace(tables.CLAIMS[0], theirs=("llama.cpp Q4_K_M",), per_byte=True)
    assert tables.ratio_of(measured, unknown) is None


@pytest.mark.parametrize("verdicts", [{}, {tables.INT4: "stage decode differs"}])
def test_an_engine_that_did_not_pass_counts_for_no_ratio(measured: record.Record, verdicts: dict[str, str]) -> None:
    measured.gate = {**measured.gate, "verdicts": verdicts}
    assert tables.ratio_of(measured, tables.CLAIMS[0]) is None
    why = verdicts.get(tables.INT4, "not verified on this bundle")
    assert f"- counts for no ratio: {tables.INT4}: {why}" in tables.to_markdown(measured)


@pytest.mark.parametrize("gate", [{"passed": False}, {"passed": None}, {"variants_passed": [True, False]}])
def test_table_says_that_a_precision_did_not_pass(measured: record.Record, gate: dict[str, object]) -> None:
    measured.gate = {**measured.gate, **gate}
    assert "did not pass its gate" in tables.to_markdown(measured)


def test_memory_counts_what_was_opened_and_not_what_is_mapped(measured: record.Record) -> None:
    memory = {"peak_pss_bytes": 60, "weights_bytes": 30, "mapped_bytes": 500, "cache_bytes": 10}
    memory = {name: number * 2**20 for name, number in memory.items()}
    measured.cold_starts = ColdStarts(warm={name: [1.0] * 6 for name in FIGURES}, memory=memory)
    measured.cold_starts.from_disk = measured.cold_starts.warm
    text = tables.to_markdown(measured)
    assert "weights 30 + cache 10 + 20 MiB" in text
    assert "(500 MiB) is mapped" in text


def test_table_shows_rates_the_share_of_bandwidth_and_who_did_not_run(measured: record.Record) -> None:
    text = tables.to_markdown(measured)
    ours = next(line for line in text.splitlines() if line.startswith(f"| {tables.INT4} ") and "250" in line)
    assert "2560.0" in ours  # 256 tokens in 100 ms
    assert "100.0" in ours
    assert "50 %" in ours  # 250 MB at 50 GB/s take 5 ms of the 10
    assert "| 25.0 " in ours  # GB/s
    assert "- not measured: optimum-onnx fp32: no file" in text
    assert "gate" not in text


def test_bytes_of_nano_are_those_of_the_parts_that_it_opens() -> None:
    manifest = bundles.read_manifest("nano")
    opened = {part.part: part.precision for part in reversed(manifest.parts)}
    found = bundles.accounted_bytes(manifest, opened)
    loaded = [part for part in manifest.parts if part.precision == opened[part.part] and part.table is None]
    assert found["weights_bytes"] == sum(manifest.file_bytes[name] for part in loaded for name in part.files)
    assert found["weights_bytes"] + found["mapped_bytes"] <= sum(manifest.file_bytes.values())
    table = next(part for part in manifest.parts if part.part == "embed_tokens")
    assert bool(found["mapped_bytes"]) is (table.table is not None)
    without = bundles.accounted_bytes(manifest, {bundles.DECODER: opened[bundles.DECODER]})
    assert without["weights_bytes"] < found["weights_bytes"]


def test_time_of_the_engine_is_that_of_the_steps() -> None:
    assert edgevlm_bundle.engine_step_ms([100.0, 2.0, 4.0], num_steps=2, num_runs=1) == 3.0
    assert edgevlm_bundle.engine_step_ms([100.0, 0.5, 2.0, 0.5, 4.0], num_steps=2, num_runs=2) == 3.5
    assert edgevlm_bundle.engine_step_ms([], num_steps=2, num_runs=1) is None


def test_engine_of_a_whole_answer_takes_part_of_its_time() -> None:
    serving = edgevlm_bundle.load({"model": "nano", "threads": 1})
    found = serving.work["whole"]({"question": "What is it?", "num_new_tokens": 8})
    assert 0 < found["engine_tpot_ms"] < found["tpot_ms"]


def test_verdicts_are_those_of_this_bundle(tmp_path: Path) -> None:
    bundle = tmp_path / artifacts.BUNDLE
    bundle.mkdir()
    (bundle / "SHA256SUMS").write_text("one")
    assert record.read_gate(bundle) == {"passed": None, "verdicts": {}}
    judged = {"bundle": bundles.fingerprint(bundle), "verdicts": {tables.INT4: ""}}
    (tmp_path / artifacts.VERIFIED).write_text(json.dumps(judged))
    assert record.read_gate(bundle)["verdicts"] == {tables.INT4: ""}
    (bundle / "SHA256SUMS").write_text("another, made in its place")
    assert record.read_gate(bundle)["verdicts"] == {}


def test_verdict_of_a_bundle_is_its_gate() -> None:
    precision = next(one.precision for one in bundles.read_manifest("nano").parts if one.part == bundles.DECODER)
    assert verdict(find_bundle("nano"), {"decoder_precision": precision}) == ""
    assert "no decoder_model_merged in int3" in verdict(find_bundle("nano"), {"decoder_precision": "int3"})


def test_engines_of_one_name_open_the_same() -> None:
    ours = [engine for engine in ENGINES if engine.worker == "edgevlm_bundle"]
    assert len({engine.name for engine in ours}) == len({(engine.name, engine.process) for engine in ours})


def maker_of(code: str, name: str = "thing") -> artifacts.Artifact:
    return artifacts.Artifact(name=name, environment=environments.OWN, command=("-c", code, "{out}"))


def test_made_file_takes_the_place_of_the_old_one_when_it_is_whole(tmp_path: Path) -> None:
    write = "import sys; from pathlib import Path; Path(sys.argv[1]).write_text('%s')"
    assert artifacts.make(maker_of(write % "old"), tmp_path).read_text() == "old"
    with pytest.raises(SystemExit, match="failed with 3"):
        artifacts.make(maker_of(f"{write % 'half'}; sys.exit(3)"), tmp_path)
    assert (tmp_path / "weights" / "thing").read_text() == "old"
    folder = "import sys; from pathlib import Path; (Path(sys.argv[1]) / 'a').mkdir(parents=True)"
    (tmp_path / "weights" / "thing.partial").mkdir()  # a maker was killed
    assert (artifacts.make(maker_of(folder), tmp_path) / "a").is_dir()
    assert sorted(path.name for path in (tmp_path / "weights").iterdir()) == ["thing", "thing.log"]


def test_maker_that_is_interrupted_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(command: list[str], **options: object) -> None:
        Path(command[-1]).mkdir()
        raise KeyboardInterrupt

    monkeypatch.setattr("bench.peers.artifacts.subprocess.run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        artifacts.make(maker_of(""), tmp_path)
    assert [path.name for path in (tmp_path / "weights").iterdir()] == ["thing.log"]


def test_bundle_that_its_gate_refused_is_kept(tmp_path: Path) -> None:
    refuse = "import sys; from pathlib import Path; Path(sys.argv[1] + '.failed').mkdir(); sys.exit(4)"
    assert artifacts.make(maker_of(refuse), tmp_path).is_dir()


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


def test_lost_worker_takes_every_engine_of_its_process_along(echo: Worker, tmp_path: Path) -> None:
    first, second = (Engine(name=name, section="text", worker="echo", model="x") for name in ("echo", "other mode"))
    alone = Engine(name="alone", section="text", worker="another", model="x")
    found = Section(series={engine.name: Series("text", {}) for engine in (first, second, alone)})
    os.killpg(echo._process.pid, signal.SIGKILL)
    rounds._round([first, second], {first.process: echo}, found, {"do": "text"}, "text", lambda text: None)
    assert sorted(found.left_out) == ["echo", "other mode"]
    assert list(found.series) == ["alone"]
    assert echo._process.returncode == -signal.SIGKILL


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process that its parent ended")
def test_worker_that_stands_still_ends_with_a_parent_that_is_killed() -> None:
    environment = {**os.environ, "PYTHONPATH": str(environments.ROOT)}
    parent = subprocess.Popen([sys.executable, "-c", SERVE], stdout=subprocess.PIPE, text=True, env=environment)
    assert parent.stdout is not None
    worker = Path("/proc", parent.stdout.readline().strip(), "stat")
    assert worker.exists()
    parent.kill()
    parent.wait()
    parent.stdout.close()
    for _ in range(300):
        if not worker.exists() or ") Z " in worker.read_text():  # gone, or waiting for init to take note
            return
        sleep(0.01)
    pytest.fail(f"{worker} outlives its parent")


def test_closing_ends_a_process_that_stands_still(echo: Worker) -> None:
    echo.close()
    with pytest.raises(ProcessLookupError):
        os.kill(echo._process.pid, signal.SIGCONT)
