"""Workers as processes that stand still while it is not their turn."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from time import monotonic
from typing import IO, Any

from bench.peers.engines import Engine
from bench.peers.environments import ROOT, environment_variables, python_of

LOADS_WITHIN_S = 300.0
ANSWERS_WITHIN_S = 600.0  # the first answer of a compiled model waits for its compiler
TAIL = 600  # characters of what a lost worker said


class WorkerLostError(Exception):
    """A worker ended or fell silent; the message says what it said last."""


class Worker:
    """One process, stopped (SIGSTOP) except while it answers: threads that wait in a loop take no core.

    ``about`` is what it said when it had loaded.  Raises WorkerLostError where it ends or takes too long.
    """

    def __init__(self, engine: Engine, folder: Path, threads: int) -> None:
        arguments = {"model": str(folder / engine.model), "threads": threads, **engine.arguments}
        command = [
            str(python_of(engine.environment, folder)),
            *("-m", f"bench.peers.workers.{engine.worker}"),
            json.dumps(arguments),
        ]
        self.name, self._log = engine.name, folder / "logs" / f"{engine.name.replace(' ', '-').replace(',', '')}.log"
        self._log.parent.mkdir(parents=True, exist_ok=True)
        with self._log.open("w", encoding="utf-8") as said:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=said,
                text=True,
                cwd=ROOT,
                env=environment_variables(folder),
                start_new_session=True,
            )
        try:
            self.about = self._read(LOADS_WITHIN_S)
        except BaseException:
            self.close()
            raise
        self._signal(signal.SIGSTOP)

    def ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Let it run for one request."""
        self._signal(signal.SIGCONT)
        try:
            stream = self._stream(self._process.stdin)
            stream.write(json.dumps(request) + "\n")
            stream.flush()
            return self._read(ANSWERS_WITHIN_S)
        except BrokenPipeError as error:
            raise self._lost("ended") from error
        finally:
            self._signal(signal.SIGSTOP)

    def close(self) -> None:
        """End the process and what it started; one that stands still would not hear a polite request."""
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            with suppress(BrokenPipeError):  # a request that a lost worker did not read
                self._stream(stream).close()

    def _read(self, seconds: float) -> dict[str, Any]:
        stream, until = self._stream(self._process.stdout), monotonic() + seconds
        ready, _, _ = select.select([stream], [], [], max(0.0, until - monotonic()))
        if not ready:
            raise self._lost(f"said nothing for {seconds:.0f} s")
        line = stream.readline()
        if not line:
            raise self._lost("ended")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _signal(self, number: signal.Signals) -> None:
        if self._process.poll() is None:
            os.killpg(self._process.pid, number)

    def _lost(self, how: str) -> WorkerLostError:
        said = " ".join(self._log.read_text(encoding="utf-8", errors="replace")[-TAIL:].split())
        return WorkerLostError(f"{self.name} {how}; {self._log} ends with: {said}")

    @staticmethod
    def _stream(stream: IO[str] | None) -> IO[str]:
        assert stream is not None  # Popen was asked for pipes
        return stream
