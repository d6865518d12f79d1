"""Make ``.venv`` hold this repository and what it needs.  Standard library only.

    python3 .ci/environment.py [--this-python]

Ready already: ends at once.  Interrupted before: goes on from there.  Started twice: the second one waits.
With ``--this-python``, which ``make PYTHON=...`` passes, a ``.venv`` of another Python version is built anew.
What "ready" means is a fingerprint of the files that decide what gets installed.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
STAMP = VENV / "edgevlm-installed"
EXTRAS = "workshop,openvino,parity,dev"
ENGINE_BUILDER = ("onnxruntime-ep-nv-tensorrt-rtx-cu13==0.5.0", "tensorrt-cu13-bindings==11.4.0.106")  # for tests/rtx

NO_ENSUREPIP = f"""\
{sys.executable} cannot create virtual environments: its module ensurepip is missing.
    Debian, Ubuntu, JetPack:  sudo apt install python3-venv
    or another Python:        make PYTHON=/path/to/python3.11"""


def main() -> None:
    """Install unless installed; ends the process with one line when that is impossible."""
    if sys.version_info < (3, 10):  # noqa: UP036  `make PYTHON=...` may name an older one
        sys.exit(f"Python 3.10 or newer is needed; {sys.executable} is {this_version()}")
    with only_one():
        if "--this-python" in sys.argv[1:] and (found := version_in_venv()) not in (None, this_version()):
            say(f".venv holds Python {found}, PYTHON asks for {this_version()}: building it anew")
            create()
        if not is_ready():
            install()


@contextmanager
def only_one() -> Iterator[None]:
    """Hold a lock that ends with the process, so a crash leaves nothing behind."""
    with open(ROOT / "constraints.txt", "rb") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("another make is installing here; waiting for it")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def is_ready() -> bool:
    """Whether the last installation ended well and started from the same files in the same place."""
    return PYTHON.exists() and STAMP.exists() and STAMP.read_text() == fingerprint()


def fingerprint() -> str:
    """What decides the content of ``.venv``: its place, the two files that list packages, and this one."""
    digest = hashlib.sha256(f"{VENV}\n".encode())
    for path in (ROOT / "pyproject.toml", ROOT / "constraints.txt", Path(__file__)):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def install() -> None:
    """Create ``.venv`` where it is missing or broken, and fill it; what only some machines can have may fail."""
    started = time.monotonic()
    STAMP.unlink(missing_ok=True)
    if not has_pip():
        create()
    say(f"installing edgevlm[{EXTRAS}] into .venv: once, about 2.2 GB with a CPU build of PyTorch, a minute or more")
    run([str(PYTHON), "-m", "pip", "install", "--quiet", "-c", "constraints.txt", "-e", f".[{EXTRAS}]"])
    if not attempt([str(PYTHON), "-m", "pip", "install", "--quiet", "--no-deps", *ENGINE_BUILDER]):
        say("no TensorRT-RTX builder for this Python or machine: the tests that build engines are skipped")
    STAMP.write_text(fingerprint())
    say(f"ready after {time.monotonic() - started:.0f} s")


def create() -> None:
    """An empty ``.venv`` with this Python; whatever stood there goes."""
    if importlib.util.find_spec("ensurepip") is None:
        sys.exit(NO_ENSUREPIP)
    say(f"creating {VENV} with Python {this_version()} ({sys.executable})")
    run([sys.executable, "-m", "venv", "--clear", str(VENV)])


def this_version() -> str:
    """``3.11.7``"""
    return sys.version.split()[0]


def version_in_venv() -> str | None:
    """The same for the Python in ``.venv``; None where that does not start."""
    if not PYTHON.exists():
        return None
    told = subprocess.run([PYTHON, "-c", "import sys; print(sys.version.split()[0])"], capture_output=True, text=True)
    return told.stdout.strip() or None


def has_pip() -> bool:
    """Whether ``.venv`` works as far as installing goes, with a Python that is new enough."""
    test = "import sys, pip; sys.exit(sys.version_info < (3, 10))"
    return PYTHON.exists() and subprocess.run([PYTHON, "-c", test], capture_output=True).returncode == 0


def attempt(command: list[str]) -> bool:
    """Whether the command went well; it says nothing."""
    return subprocess.run(command, cwd=ROOT, env=settings(), capture_output=True).returncode == 0


def settings() -> dict[str, str]:
    """The environment of pip."""
    return {**os.environ, "PIP_USER": "0", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}


def run(command: list[str]) -> None:
    """Show the command's own output; when it fails, fail with its exit code."""
    code = subprocess.run(command, cwd=ROOT, env=settings()).returncode
    if code:
        say(f"failed: {' '.join(command)}")
        say("the lines above say why; the same make command goes on from here")
        sys.exit(code)


def say(line: str) -> None:
    """One line of progress."""
    print(f"environment: {line}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        say("interrupted; the same make command goes on from here")
        sys.exit(130)
