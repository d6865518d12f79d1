from __future__ import annotations

import errno
import importlib
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Annotated

import pytest
import typer
from typer.testing import CliRunner, Result

from edgevlm.cli import app as app_module
from edgevlm.cli import console
from edgevlm.cli.app import BY_NAME, VERBS, Verb, app
from edgevlm.core.errors import (
    BenchmarkError,
    ConfigError,
    DeviceError,
    DoesNotFitError,
    EdgeVLMError,
    InputError,
    IntegrityError,
    MissingLibraryError,
    ParityError,
    UnsupportedError,
)

Register = Callable[[Callable[..., object]], None]


@pytest.fixture(autouse=True)
def quiet_logging() -> Iterator[None]:
    logger = logging.getLogger("edgevlm")
    before = (logger.handlers, logger.propagate, logger.level)
    yield
    logger.handlers, logger.propagate = before[0], before[1]
    logger.setLevel(before[2])
    console.settings.quiet = console.settings.verbose = False


@pytest.fixture
def register(monkeypatch: pytest.MonkeyPatch) -> Register:
    """Puts a function behind the verb ``probe``."""

    def put(function: Callable[..., object]) -> None:
        module = ModuleType("edgevlm.cli.probe")
        module.command = function  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "edgevlm.cli.probe", module)
        monkeypatch.setitem(BY_NAME, "probe", Verb("probe", "Test", "For a test."))

    return put


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, arguments)


def edgevlm(*arguments: str, **options: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "edgevlm", *arguments]
    return subprocess.run(command, capture_output=True, text=True, **options)  # type: ignore[call-overload,no-any-return]


# -- finding a verb -----------------------------------------------------------------------------------------


def test_help_names_every_verb_and_imports_none(root: Path) -> None:
    code = (
        "import sys; from edgevlm.cli.app import VERBS, app\n"
        "try: app(['--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'numpy', 'onnxruntime', 'rich', 'edgevlm.bundle', *(v.module for v in VERBS)}\n"
        "print('imported:', sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert "imported: []" in done.stdout
    for verb in VERBS:
        assert f"  {verb.name} " in done.stdout


@pytest.mark.parametrize("verb", VERBS, ids=lambda verb: verb.name)
def test_every_verb_in_the_table_can_be_loaded(verb: Verb) -> None:
    assert callable(importlib.import_module(verb.module).command)
    result = run(verb.name, "--help")
    assert result.exit_code == 0, result.output
    assert f"Usage: edgevlm {verb.name}" in result.stdout


def test_no_arguments_show_the_help() -> None:
    assert run().stdout == run("--help").stdout == run("-h").stdout


def test_an_unknown_verb_suggests_the_nearest() -> None:
    result = run("exprot")
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.startswith("error: no verb named 'exprot'; known: bench, ")
    assert result.stderr.endswith("Did you mean 'export'?\n")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("version", "--nonsense"), "No such option: --nonsense (see `edgevlm version --help`)"),
        (("version", "surplus"), "unexpected extra argument"),
        (("bundle",), "Missing command. (see `edgevlm bundle --help`)"),
        (("bundle", "sho"), "No such command 'sho'"),
        (("bundle", "show"), "Missing argument"),
        (("--nonsense",), "No such option: --nonsense (see `edgevlm --help`)"),
    ],
)
def test_a_wrong_command_line_is_one_line_and_exit_code_2(arguments: tuple[str, ...], words: str) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert words in result.stderr


def test_version_is_told_both_ways() -> None:
    assert run("--version").stdout.startswith("edgevlm ")
    assert run("version").stdout.startswith("edgevlm ")


# -- shared flags -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("probe",), (False, False)),
        (("-q", "probe"), (True, False)),
        (("probe", "-q"), (True, False)),
        (("probe", "--verbose"), (False, True)),
        (("-v", "probe", "--name", "-q"), (False, True)),
    ],
)
def test_quiet_and_verbose_are_taken_before_and_after_the_verb(
    register: Register, arguments: tuple[str, ...], expected: tuple[bool, bool]
) -> None:
    seen = []

    def command(name: Annotated[str, typer.Option()] = "") -> None:
        seen.append((console.settings.quiet, console.settings.verbose))

    register(command)
    assert run(*arguments).exit_code == 0
    assert seen == [expected]


def test_logs_go_to_stderr_and_follow_the_flags(register: Register) -> None:
    def command() -> None:
        logging.getLogger("edgevlm.room").info("a note")
        logging.getLogger("edgevlm.room").debug("a detail")
        typer.echo("the result")

    register(command)
    assert (run("probe").stdout, run("probe").stderr) == ("the result\n", "a note\n")
    assert run("probe", "-q").stderr == ""
    assert run("probe", "-v").stderr == "edgevlm.room: a note\nedgevlm.room: a detail\n"


def test_what_a_verb_returns_is_not_its_exit_code(register: Register) -> None:
    register(lambda: 3)
    assert run("probe").exit_code == 0


def test_a_verb_may_choose_its_exit_code(register: Register) -> None:
    def command() -> None:
        raise typer.Exit(4)

    register(command)
    assert run("probe").exit_code == 4


# -- errors -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (EdgeVLMError("x"), 1, "x"),
        (InputError("x"), 2, "x"),
        (ConfigError("x"), 2, "x"),
        (UnsupportedError("x"), 3, "x"),
        (ParityError("x"), 4, "x"),
        (DoesNotFitError("x"), 5, "x"),
        (MissingLibraryError("torch", "pip install torch"), 6, "torch is not installed: pip install torch"),
        (IntegrityError("two\nlines"), 7, "two lines"),
        (IntegrityError("bad \x1b[31mname"), 7, r"bad \x1b[31mname"),
        (DeviceError("x"), 8, "x"),
        (BenchmarkError("x"), 9, "x"),
        (MemoryError(), 5, "out of memory"),
        (OSError(errno.ENOSPC, "No space left on device", "/out/a"), 5, "/out/a: no space left"),
        (RuntimeError("write failed: No space left on device"), 5, "output: no space left"),
        (
            ModuleNotFoundError("No module named 'no_such_lib.nn'", name="no_such_lib.nn"),
            6,
            "no_such_lib is not installed: pip install no_such_lib",
        ),
        (
            ModuleNotFoundError("No module named 'numpy.nosuch'", name="numpy.nosuch"),
            6,
            "numpy is installed but does not load (No module named 'numpy.nosuch')",
        ),
        (ModuleNotFoundError("No module", name="edgevlm.x"), 1, "unexpected ModuleNotFoundError"),
        (ValueError("a bug"), 1, "unexpected ValueError: a bug (run again with -v for the traceback)"),
        (KeyboardInterrupt(), 130, None),
        (typer.Abort(), 130, None),
        (BrokenPipeError(), 141, ""),
        (SystemExit(143), 143, ""),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else None,
)
def test_every_failure_is_one_line_and_its_exit_code(
    register: Register, error: BaseException, code: int, words: str | None
) -> None:
    def command() -> None:
        raise error

    register(command)
    result = run("probe")
    assert result.exit_code == code
    assert result.stdout == ""
    if not words:
        assert result.stderr == ("interrupted\n" if words is None else "")
        return
    assert result.stderr.startswith(f"error: {words}")
    assert result.stderr.count("\n") == 1


def test_verbose_adds_the_traceback(register: Register) -> None:
    def command() -> None:
        raise ValueError("a bug")

    register(command)
    stderr = run("probe", "-v").stderr
    assert "Traceback" in stderr
    assert stderr.endswith("error: unexpected ValueError: a bug\n")


def test_an_interrupt_cleans_up_before_it_leaves(tmp_path: Path, register: Register) -> None:
    from edgevlm.core.files import atomic_directory

    def command() -> None:
        with atomic_directory(tmp_path / "out") as scratch:
            (scratch / "half").write_text("x")
            raise KeyboardInterrupt

    register(command)
    assert run("probe").exit_code == 130
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("number", "code", "words"),
    [(signal.SIGTERM, 143, ""), (signal.SIGHUP, 129, ""), (signal.SIGINT, 130, "interrupted\n")],
)
def test_a_signal_leaves_no_half_written_output(tmp_path: Path, root: Path, number: int, code: int, words: str) -> None:
    (tmp_path / "slow_verb.py").write_text(
        "import sys, time; from pathlib import Path; from edgevlm.core.files import atomic_directory\n"
        "def command(out: Path) -> None:\n"
        "    with atomic_directory(out) as scratch:\n"
        "        (scratch / 'half').write_text('x'); print('ready', flush=True); time.sleep(60)\n"
    )
    program = (
        "import sys, slow_verb; from edgevlm.cli import app\n"
        "sys.modules['edgevlm.cli.slow'] = slow_verb; app.BY_NAME['slow'] = app.Verb('slow', '', '')\n"
        f"sys.argv = ['edgevlm', 'slow', {str(tmp_path / 'out')!r}]; app.main()"
    )
    path = os.pathsep.join([str(root), str(tmp_path)])
    process = subprocess.Popen(
        [sys.executable, "-B", "-c", program],
        env={**os.environ, "PYTHONPATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(number)
    _, stderr = process.communicate(timeout=30)
    assert (process.returncode, stderr) == (code, words)
    assert [path.name for path in tmp_path.iterdir()] == ["slow_verb.py"]


def test_exit_codes_reach_the_shell(root: Path, tmp_path: Path) -> None:
    done = edgevlm("bundle", "show", str(tmp_path / "none"), cwd=root)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: no bundle at ")
    assert edgevlm("-q", "version", cwd=root).returncode == 0


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_full_disk_behind_stdout_is_told(root: Path) -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "edgevlm", "version"],
            cwd=root,
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
        )
    assert done.returncode == 5
    assert done.stderr.startswith("error: output: no space left on the disk")
    assert done.stderr.count("\n") == 1


def test_a_reader_that_leaves_is_no_error(root: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-m", "edgevlm", "version"],
        cwd=root,
        stdout=writer,
        stderr=subprocess.PIPE,
        text=True,
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")


# -- console ------------------------------------------------------------------------------------------------


def test_json_is_alone_on_stdout_and_holds_every_letter(capsys: pytest.CaptureFixture[str]) -> None:
    console.print_json({"text": "Äpfel 🍎"})
    assert capsys.readouterr().out == '{\n  "text": "Äpfel 🍎"\n}\n'


def test_json_for_a_terminal_without_unicode_is_escaped(root: Path) -> None:
    code = "from edgevlm.cli.console import print_json; print_json({'text': 'Ä'})"
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run([sys.executable, "-c", code], cwd=root, env=environment, capture_output=True, text=True)
    assert done.stdout == '{\n  "text": "\\u00c4"\n}\n'


def test_progress_in_a_log_speaks_only_of_slow_work(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 100.0
    monkeypatch.setattr(console.time, "monotonic", lambda: now)
    with console.progress("hashing", 10) as advance:
        advance(1)
        assert capsys.readouterr().err == ""
        now += 3
        advance(1)
        assert capsys.readouterr().err == "hashing: 2 of 10 (3 s)\n"
        now += 5
        advance(1)
        assert capsys.readouterr().err == ""
        now += 6
        advance(1)
        assert capsys.readouterr().err == "hashing: 4 of 10 (14 s)\n"


def test_steps_that_are_left_out_count_as_done(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(console, "PLAIN_AFTER_S", 0)
    monkeypatch.setattr(console, "PLAIN_EVERY_S", 0)
    with console.steps("export", ("load", "fusion", "verify")) as begin:
        begin("load")
        begin("verify")
    shown = [line.partition(" (")[0] for line in capsys.readouterr().err.splitlines()]
    assert shown == ["export: 0 of 3", "  load", "export: 2 of 3", "  verify", "export: 3 of 3"]


def test_how_far_a_step_is_is_said_now_and_then(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    monkeypatch.setattr(console.time, "monotonic", lambda: now)
    with console.steps("export", ("calibrate", "verify")) as begin:
        for name in ("calibrate", "calibrate: 1 of 3", "calibrate: 2 of 3", "calibrate: 3 of 3", "verify"):
            begin(name)
            now += 6
    shown = [line for line in capsys.readouterr().err.splitlines() if line.startswith("  ")]
    assert shown == ["  calibrate", "  calibrate: 2 of 3", "  verify"]


def test_progress_is_silent_when_quiet(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console.settings, "quiet", True)
    with console.progress("hashing", 10) as advance:
        advance(10)
    console.say("a note")
    assert capsys.readouterr().err == ""


def test_progress_on_a_terminal_draws_a_bar_and_stays_off_stdout(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    for total in (2, None):
        with console.progress("hashing", total) as advance:
            advance(1)
            time.sleep(0)
    captured = capsys.readouterr()
    assert "hashing" in captured.err
    assert captured.out == ""


def test_the_table_holds_each_verb_once() -> None:
    assert len(BY_NAME) == len(VERBS) == len({verb.module for verb in VERBS})
    assert app_module.VERBS is VERBS
