"""The static page of ``runtimes/web`` answers in a headless Chromium as ``edgevlm run`` does here."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from edgevlm.cli.app import app
from edgevlm.evaluation.scenes import make_scene, questions, render
from edgevlm.export.pipeline import export_bundle

QUESTION, NUM_TOKENS = "What is there?", 6
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-dev-shm-usage"),
    *("--remote-debugging-pipe", "--disable-background-networking", "--disable-component-update"),
)
STATE = (
    "(found => found ? JSON.stringify({...found.dataset, text: found.textContent}) : '{}')"
    "(document.getElementById('answer'))"
)


class Browser:
    """A headless Chromium, spoken to through two pipes: JSON messages that end with a zero byte."""

    def __init__(self, program: str, profile: Path) -> None:
        to_read, self._write = os.pipe()
        self._read, to_write = os.pipe()
        low, high = (os.fdopen(number, "rb") for number in (to_read, to_write))  # closed with the block below

        def place() -> None:
            spare = os.dup(to_write)
            os.dup2(to_read, 3)
            os.set_inheritable(3, True)  # where it already was 3
            os.dup2(spare, 4)

        with low, high:
            self._process = subprocess.Popen(
                [program, *FLAGS, f"--user-data-dir={profile}", "about:blank"],
                preexec_fn=place,
                close_fds=False,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
        self._rest, self._number = b"", 0

    def call(self, method: str, session: str | None = None, **parameters: object) -> dict[str, Any]:
        """The result of one command, nothing where it failed; events that come between are dropped."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        os.write(self._write, json.dumps({**message, **({"sessionId": session} if session else {})}).encode() + b"\0")
        while True:
            answer = self._message()
            if answer.get("id") == self._number:
                return dict(answer.get("result", {}))

    def _message(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            piece = os.read(self._read, 1 << 16)
            assert piece, "the browser has gone"
            self._rest += piece
        text, self._rest = self._rest.split(b"\0", 1)
        return dict(json.loads(text))

    def open(self, address: str) -> Callable[[str], Any]:
        """Show a page; what comes back evaluates a script in it."""
        target = self.call("Target.createTarget", url=address)["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]

        def evaluate(script: str) -> Any:
            """The value of ``script``; None while the page is still on its way."""
            return self.call("Runtime.evaluate", session, expression=script).get("result", {}).get("value")

        return evaluate

    def close(self) -> None:
        self._process.terminate()
        self._process.wait(timeout=30)
        os.close(self._write)
        os.close(self._read)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    program = next(filter(None, map(shutil.which, BROWSERS)), None)
    if program is None:
        pytest.skip(f"no browser to test the page in: expected one of {', '.join(BROWSERS)}")
    browser = Browser(program, tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


@pytest.fixture(scope="module")
def node_modules(root: Path) -> Path:
    folder = Path(os.environ.get("EDGEVLM_NODE_MODULES") or root / "runtimes" / "web" / "node_modules")
    if shutil.which("node") is None:
        pytest.skip("node is not installed: nothing here can serve the page")
    for name in ("@huggingface/transformers", "onnxruntime-web"):
        if not (folder / name / "package.json").is_file():
            pytest.skip(f"no {name} in {folder}: run `npm install --ignore-scripts` in runtimes/web")
    return folder


@pytest.fixture
def bundle(tiny_bundle: Path, tmp_path: Path) -> Path:
    """A bundle, and a picture in its folder which needs no resizing, so that every library gives the same pixels."""
    copy = Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))
    pixels = np.random.default_rng(0).integers(0, 256, (20, 32, 3), dtype=np.uint8)  # padded to 32 x 32
    Image.fromarray(pixels).save(copy / "picture.png")
    return copy


@pytest.fixture
def address(bundle: Path, root: Path, node_modules: Path) -> Iterator[str]:
    """Where ``serve.mjs`` shows the bundle."""
    with served(bundle, root, node_modules) as place:
        yield place


@contextmanager
def served(bundle: Path, root: Path, node_modules: Path) -> Iterator[str]:
    command = ["node", str(root / "runtimes" / "web" / "serve.mjs"), str(bundle), "--port", "0"]
    environment = {**os.environ, "EDGEVLM_NODE_MODULES": str(node_modules)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as server:
        assert server.stdout is not None
        yield server.stdout.readline().strip()
        server.terminate()


def answer_of(evaluate: Callable[[str], Any], seconds: float = 90.0) -> dict[str, str]:
    """What the page's answer says once it is there."""
    end = time.monotonic() + seconds
    found: dict[str, str] = {}
    while time.monotonic() < end:
        found = json.loads(evaluate(STATE) or "{}")
        if found.get("state") in ("done", "failed"):
            return found
        time.sleep(0.2)
    raise AssertionError(f"no answer after {seconds:.0f} s: {found}")


def ours(bundle: Path, question: str = QUESTION, *options: str) -> dict[str, Any]:
    arguments = ["--image", str(bundle / "picture.png"), "--prompt", question, "--max-tokens", str(NUM_TOKENS)]
    result = CliRunner().invoke(app, ["run", str(bundle), *arguments, *options, "--json"])
    assert result.exit_code == 0, result.output
    return dict(json.loads(result.stdout))


def test_the_page_answers_as_the_command_line_does(browser: Browser, address: str, bundle: Path) -> None:
    expected = ours(bundle)
    wishes = {"picture": "/bundle/picture.png", "question": QUESTION, "max_tokens": NUM_TOKENS}
    evaluate = browser.open(f"{address}?{urllib.parse.urlencode(wishes)}")
    found = answer_of(evaluate)
    assert found["state"] == "done", found["text"]
    assert found["ids"] == " ".join(map(str, expected["token_ids"]))
    assert len(expected["token_ids"]) > 1
    assert evaluate("crossOriginIsolated") is True  # threads of WebAssembly need it


@pytest.mark.slow
def test_nano_answers_in_a_browser_in_every_precision(
    browser: Browser, root: Path, node_modules: Path, tmp_path: Path
) -> None:
    """Of a trained model: with random weights some ids of q4 and int8 are others in a browser."""
    bundle = tmp_path / "nano.bundle"
    words = {"q4": "int4-b128", "q8": "int8-dynamic", "int8": "int8-b32", "fp16": "fp16"}
    export_bundle("nano", out=bundle, decoder_precision=",".join(words.values()), calib_samples=4)
    scene = make_scene(11, 0)
    Image.fromarray(render(scene, 128)).save(bundle / "picture.png")
    prompt = questions(scene)[0].prompt
    with served(bundle, root, node_modules) as address:
        for word, precision in words.items():
            wishes = {"picture": "/bundle/picture.png", "question": prompt, "max_tokens": NUM_TOKENS, "decoder": word}
            found = answer_of(browser.open(f"{address}?{urllib.parse.urlencode(wishes)}"))
            expected = ours(bundle, prompt, "--decoder-precision", precision)["token_ids"]
            assert (found["state"], found.get("ids")) == ("done", " ".join(map(str, expected))), (word, found)


def test_the_server_shows_its_own_folders_alone(address: str, bundle: Path) -> None:
    (bundle.parent / "secret.txt").write_text("no")

    def status(path: str) -> int:
        try:
            with urllib.request.urlopen(address.rstrip("/") + path) as response:
                return int(response.status)
        except urllib.error.HTTPError as error:
            return error.code

    assert [status(path) for path in ("/", "/bundle/edgevlm.json", "/transformers/transformers.min.js")] == [200] * 3
    outside = ("/bundle/..%2fsecret.txt", "/bundle/%2e%2e/secret.txt", "/serve.mjs", "/bundle/", "/%ff", "/etc/passwd")
    assert [status(path) for path in outside] == [404] * 6
