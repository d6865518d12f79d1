"""An export that is interrupted, killed, or not alone."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from edgevlm.bundle.pack import pack
from edgevlm.bundle.read import read_bundle
from edgevlm.cli.app import app

pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")

Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def start(root: Path) -> Iterator[Start]:
    """Start ``edgevlm`` as a process of its own, on one core; none outlives the test."""
    processes = []

    def run(*arguments: object) -> subprocess.Popen[str]:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}
        command = [sys.executable, "-m", "edgevlm", *map(str, arguments)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        processes.append(subprocess.Popen(command, env=environment, text=True, **pipes))  # type: ignore[call-overload]
        return processes[-1]

    yield run
    for process in processes:
        process.kill()
        process.communicate()


def wait_for(step: str, process: subprocess.Popen[str]) -> None:
    """Until ``process`` says that ``step`` begins."""
    assert process.stderr is not None
    said = []
    for line in process.stderr:
        said.append(line)
        if line.strip() == step:
            return
    pytest.fail(f"{step} was not said, only: {said}")


def said_after(process: subprocess.Popen[str]) -> list[str]:
    """The rest of stderr without the lines that show progress; stdout must be empty."""
    stdout, stderr = process.communicate(timeout=120)
    assert stdout == ""
    return [line for line in stderr.splitlines() if not line.startswith(("  ", "export "))]


@pytest.mark.parametrize(
    ("number", "step", "overwrite", "code", "words"),
    [
        (signal.SIGINT, "load", True, 130, ["interrupted"]),
        (signal.SIGTERM, "vision_encoder", False, 143, []),
    ],
    ids=["Ctrl-C", "SIGTERM"],
)
def test_an_interrupted_export_leaves_everything_as_it_was(
    tmp_path: Path,
    checkpoint: Path,
    bundle: Path,
    start: Start,
    number: signal.Signals,
    step: str,
    overwrite: bool,
    code: int,
    words: list[str],
) -> None:
    process = start("export", checkpoint, *([bundle, "--overwrite"] if overwrite else [tmp_path / "out"]))
    wait_for(step, process)
    process.send_signal(number)
    assert (said_after(process), process.returncode) == (words, code)
    assert read_bundle(bundle).manifest.name != checkpoint.name
    assert sorted(tmp_path.iterdir()) == [bundle, checkpoint]


def test_a_killed_export_keeps_the_bundle_that_was_to_be_replaced(
    tmp_path: Path, checkpoint: Path, bundle: Path, start: Start
) -> None:
    process = start("export", checkpoint, bundle, "--overwrite")
    wait_for("load", process)
    process.kill()
    process.communicate()
    assert read_bundle(bundle).manifest.name != checkpoint.name
    left = sorted(path.name for path in tmp_path.iterdir() if path not in (bundle, checkpoint))
    assert [name.startswith(".bundle.") and name.endswith(".partial") for name in left] == [True]


def test_of_two_exports_to_one_folder_one_wins_and_the_other_says_so(
    tmp_path: Path, checkpoint: Path, start: Start
) -> None:
    out = tmp_path / "out"
    both = [start("export", checkpoint, out) for _ in range(2)]
    for process in both:
        wait_for("load", process)
    ended = [process.communicate(timeout=300) for process in both]
    assert sorted(process.returncode for process in both) == [0, 2]
    loser = ended[[process.returncode for process in both].index(2)]
    assert loser[0] == ""
    assert loser[1].splitlines()[-1].startswith(f"error: {out} exists already: choose another name or pass --overwrite")
    assert read_bundle(out).manifest.name == checkpoint.name
    assert sorted(tmp_path.iterdir()) == [checkpoint, out]


def test_nobody_slips_in_between_the_last_look_and_the_swap(tmp_path: Path, tiny_bundle: Path, start: Start) -> None:
    """While another process holds the folder, an output waits; then it sees what has appeared there."""
    import fcntl

    packed, theirs, out = pack(tiny_bundle, tmp_path / "packed.tar"), tmp_path / "theirs", tmp_path / "out"
    theirs.mkdir()
    (theirs / "edgevlm.json").write_text("theirs")
    folder = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(folder, fcntl.LOCK_EX)
    process = start("bundle", "unpack", packed, out)
    while not list(tmp_path.glob(".out.*.partial/verify.json")) and process.poll() is None:
        time.sleep(0.01)
    time.sleep(0.2)
    theirs.rename(out)
    os.close(folder)
    _, stderr = process.communicate(timeout=60)
    assert (process.returncode, stderr.count("\n")) == (2, 1)
    assert "exists already" in stderr
    assert (out / "edgevlm.json").read_text() == "theirs"


def test_a_swap_that_fails_or_is_interrupted_puts_the_old_one_back(
    tmp_path: Path, bundle: Path, tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed, rename = pack(tiny_bundle, tmp_path / "packed.tar"), Path.rename

    def interrupted(path: Path, target: Path) -> Path:
        moved = rename(path, target)
        if target.name.endswith(".old"):
            raise KeyboardInterrupt
        return moved

    (bundle / "notes.txt").write_text("mine")
    monkeypatch.setattr(Path, "rename", interrupted)
    result = CliRunner().invoke(app, ["bundle", "unpack", str(packed), str(bundle), "--overwrite"])
    assert result.exit_code == 130
    assert (bundle / "notes.txt").read_text() == "mine"
    assert sorted(tmp_path.iterdir()) == [bundle, packed]


# -- a process of which only the verb is made up ------------------------------------------------------------


def run_verb(root: Path, body: str, **options: object) -> subprocess.CompletedProcess[str]:
    """Run ``body`` as the verb ``probe``."""
    program = (
        "import os, signal, sys, types\nfrom edgevlm.cli import app\n"
        f"def command() -> None:\n{body}\n"
        "sys.modules['edgevlm.cli.probe'] = types.SimpleNamespace(command=command)\n"
        "app.BY_NAME['probe'] = app.Verb('probe', '', '')\nsys.argv = ['edgevlm', 'probe']\napp.main()\n"
    )
    command = [sys.executable, "-c", program]
    return subprocess.run(command, cwd=root, capture_output=True, text=True, **options)  # type: ignore[call-overload,no-any-return]


@pytest.mark.parametrize(("name", "code", "words"), [("SIGINT", 130, "interrupted\n"), ("SIGTERM", 143, "")])
def test_a_library_that_swallows_the_signal_does_not_hide_it(root: Path, name: str, code: int, words: str) -> None:
    body = (
        f"    try:\n        os.kill(os.getpid(), signal.{name})\n"
        "    except BaseException:\n        raise RuntimeError('half imported') from None\n"
    )
    done = run_verb(root, body)
    assert (done.returncode, done.stdout) == (code, "")
    assert done.stderr == words


def test_nohup_holds(root: Path) -> None:
    def ignore() -> None:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)

    done = run_verb(root, "    os.kill(os.getpid(), signal.SIGHUP)\n    print('still here')", preexec_fn=ignore)
    assert (done.returncode, done.stdout, done.stderr) == (0, "still here\n", "")
