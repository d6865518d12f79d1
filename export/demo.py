"""The whole way once: export the shipped model, verify the bundle, ask it, measure it, write a report.

    python export/demo.py [FOLDER]

`make demo` runs this with the folder `demo`.  The bundle there is kept until a file of the package changes.
"""

from __future__ import annotations

import fcntl
import hashlib
import subprocess
import sys
import time
from pathlib import Path

import edgevlm
from edgevlm.bench.record import write_measurement
from edgevlm.bench.report import QuestionAnswer, write_report
from edgevlm.core.config import read_json
from edgevlm.core.errors import EdgeVLMError
from edgevlm.core.files import write_text
from edgevlm.runtimes.vlm import RuntimeVlm
from edgevlm.shipped import DEMO_IMAGE
from edgevlm.verify import golden_answers_match, verify_bundle

QUESTIONS = {  # about the shipped picture, with the right answers where there is just one
    "How many objects are there?": "5",
    "What does the sign say?": "CAFE",
    "Describe the picture.": None,
}


def main(folder: Path) -> None:
    """Take every step, each with its heading."""
    bundle = export_once(folder)
    verify(bundle)
    with edgevlm.open_bundle(bundle, runtime="onnxruntime") as vlm:
        answers = ask(vlm)
        step("Benchmark: a new picture each time, after a warm-up")
        measurement = edgevlm.measure(vlm, check=golden_answers_match)
        print(measurement)
    write_measurement(folder / "bench.jsonl", measurement)
    write_report(
        folder / "report.html",
        {"nano": measurement},
        verify=read_json(bundle / "verify.json"),
        answers=answers,
        image_png=DEMO_IMAGE.read_bytes(),
    )
    step("Report")
    print(folder / "report.html")


def export_once(folder: Path) -> Path:
    """The bundle of the shipped model, exported again only when the package has changed since."""
    bundle, note = folder / "nano.bundle", folder / "exported-from.txt"
    step(f"Export: nano to ONNX, in {bundle}")
    if bundle.is_dir() and note.is_file() and note.read_text() == fingerprint():
        print("nothing has changed since the last export; delete the folder to export again")
        return bundle
    # In a process of its own, so that what is measured below is a device's process, without PyTorch.
    command = [sys.executable, "-m", "edgevlm", "export", "nano", str(bundle), "--target", "onnx", "--overwrite"]
    done = subprocess.run(command)
    if done.returncode:
        sys.exit(done.returncode)
    write_text(note, fingerprint())
    return bundle


def fingerprint() -> str:
    """Name, size and time of every file of the package: what an export depends on."""
    package = Path(edgevlm.__file__).parent
    files = sorted(path for path in package.rglob("*") if path.is_file() and path.suffix != ".pyc")
    facts = [(str(path.relative_to(package)), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    return hashlib.sha256(repr(facts).encode()).hexdigest()


def verify(bundle: Path) -> None:
    """The parity gate once more, as a device would run it: from the golden tensors, without PyTorch."""
    step("Verify: largest difference to PyTorch, stage by stage")
    for one in verify_bundle(bundle).require().stages:
        print(f"{one.stage:16} {one.max_abs:9.2g}   allowed {one.tolerance:.2g}   {one.note}".rstrip())


def ask(vlm: RuntimeVlm) -> list[QuestionAnswer]:
    """Three questions about the shipped picture."""
    step(f"Ask: three questions about {DEMO_IMAGE}")
    answers = []
    for question, expected in QUESTIONS.items():
        answer = vlm.ask(DEMO_IMAGE, question)
        print(f"{question}  {answer.text}")
        ttft_user_ms = answer.timings.ttft_user_ms
        answers.append(
            QuestionAnswer(question=question, answer=answer.text, expected=expected, ttft_user_ms=ttft_user_ms)
        )
    return answers


def step(title: str) -> None:
    """A heading, on its own before anything that takes time."""
    print(f"\n{title}", flush=True)


def in_turn(folder: Path) -> None:
    """The demo, after any other one that is at work in ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        main(folder)


if __name__ == "__main__":
    started = time.monotonic()
    try:
        in_turn(Path(sys.argv[1] if len(sys.argv) > 1 else "demo").absolute())
    except EdgeVLMError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    print(f"\ndone in {time.monotonic() - started:.0f} s")
