"""The files that the engines read, all made from the same random weights, each by its own project's tools."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.peers.environments import OWN, ROOT, environment_variables, python_of

MAX_CONTEXT = 1024
CHECKPOINT, TEXT_MODEL, WORKLOAD = "fastvlm-0.5b", "qwen2-0.5b", "workload.json"
BUNDLE, VERIFIED = "edgevlm.bundle", "verified.json"
QUESTION_TOKENS, PREFILL_TOKENS, COLD_START_TOKENS = 32, 256, 64
GENAI_OPTIONS = ("prune_lm_head=true", "fuse_mlp_gate_up=true", "block_size=128", "int4_block_size=128")


@dataclass(frozen=True, kw_only=True)
class Artifact:
    """``command`` (after the interpreter of ``environment``) makes ``name`` below the folder of weights.

    In the command, ``{name}`` of another artifact or ``{out}`` stands for its path.
    """

    name: str
    environment: str
    command: tuple[str, ...]


def _genai(*options: str) -> tuple[str, ...]:
    builder = ("-m", "onnxruntime_genai.models.builder", "-i", "{qwen2-0.5b}", "-o", "{out}")
    return (*builder, "-p", "int4", "-e", "cpu", "-c", "{out}.cache", "--extra_options", *GENAI_OPTIONS, *options)


def _openvino(*scheme: str) -> tuple[str, ...]:
    return ("-m", "bench.peers.makers.openvino_folder", "{qwen2-0.5b}", "{out}", *scheme)


def _optimum() -> tuple[str, ...]:
    task = ("--task", "text-generation-with-past", "--dtype", "fp32", "--no-post-process")
    return ("-m", "optimum.commands.optimum_cli", "export", "onnx", "--model", "{qwen2-0.5b}", *task, "{out}")


def _edgevlm(encoder: str, decoder: str) -> tuple[str, ...]:
    size = ("--max-context", str(MAX_CONTEXT), "--overwrite", "--keep")
    precisions = ("--encoder-precision", encoder, "--decoder-precision", decoder)
    return ("-m", "edgevlm", "export", "{fastvlm-0.5b}", "{out}", *size, *precisions)


ARTIFACTS: tuple[Artifact, ...] = (
    Artifact(name=CHECKPOINT, environment=OWN, command=("-m", "bench.peers.makers.checkpoints", "whole", "{out}")),
    Artifact(
        name=TEXT_MODEL,
        environment=OWN,
        command=("-m", "bench.peers.makers.checkpoints", "text", "{fastvlm-0.5b}", "{out}"),
    ),
    Artifact(
        name="gguf", environment="llama", command=("-m", "bench.peers.makers.gguf_files", "{qwen2-0.5b}", "{out}")
    ),
    Artifact(
        name="compiled.json",
        environment=OWN,
        command=("-m", "bench.peers.makers.compiled", "{qwen2-0.5b}", "{out}"),
    ),
    Artifact(name="genai-int4", environment="genai", command=_genai("exclude_embeds=true")),
    Artifact(name="genai-int4-generator", environment="genai", command=_genai()),
    Artifact(name="openvino-int8", environment="ovgenai", command=_openvino("8")),
    Artifact(name="openvino-int4", environment="ovgenai", command=_openvino("4", "32")),
    Artifact(name="optimum-fp32", environment="optimum", command=_optimum()),
    Artifact(name=BUNDLE, environment=OWN, command=_edgevlm("fp32,int8", "int4,int8-dynamic,fp32")),
    Artifact(
        name=WORKLOAD,
        environment=OWN,
        command=("-m", "bench.peers.makers.workload", f"{{{BUNDLE}}}", "{out}"),
    ),
    Artifact(
        name=VERIFIED,
        environment=OWN,
        command=("-m", "bench.peers.makers.verified", f"{{{BUNDLE}}}", "{out}"),
    ),
)


def make(artifact: Artifact, folder: Path) -> Path:
    """Run its command, its words kept beside it; what it made takes the place of an older one once it is whole.

    A bundle of EdgeVLM whose gate says no is kept under its name all the same, since random weights have no meaning
    that a precision could lose; its ``verify.json`` says so, and so does the table.
    """
    weights = folder / "weights"
    weights.mkdir(parents=True, exist_ok=True)
    out, partial = weights / artifact.name, weights / f"{artifact.name}.partial"
    failed, cache = partial.with_name(f"{partial.name}.failed"), partial.with_name(f"{partial.name}.cache")
    _remove(partial, failed, cache)  # of a run that was killed
    try:
        code, log = _run(artifact, folder, partial), weights / f"{artifact.name}.log"
        made = failed if code and failed.exists() else partial
        if (code and made is partial) or not made.exists():
            raise SystemExit(f"{artifact.name}: its maker failed with {code}; it said: {log}")
        _remove(out)
        made.rename(out)
    finally:
        _remove(partial, failed, cache)
    return out


def paths(folder: Path) -> dict[str, Path]:
    """Where every artifact is or would be."""
    return {artifact.name: folder / "weights" / artifact.name for artifact in ARTIFACTS}


def read_workload(folder: Path) -> Mapping[str, object]:
    """What is asked: the ids of the prompts, and the question."""
    text = (folder / "weights" / WORKLOAD).read_text(encoding="utf-8")
    read: Mapping[str, object] = json.loads(text)
    return read


def _run(artifact: Artifact, folder: Path, out: Path) -> int:
    """The exit status of its command; what it said is beside the files."""
    weights = folder / "weights"
    with (weights / f"{artifact.name}.log").open("w", encoding="utf-8") as said:
        command = [str(python_of(artifact.environment, folder)), *_filled(artifact.command, weights, out)]
        environment = environment_variables(folder)
        return subprocess.run(command, stdout=said, stderr=subprocess.STDOUT, cwd=ROOT, env=environment).returncode


def _remove(*paths: Path) -> None:
    """Files and folders; those that are not there are no fault."""
    for path in paths:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def _filled(command: Sequence[str], weights: Path, out: Path) -> list[str]:
    names = {artifact.name: str(weights / artifact.name) for artifact in ARTIFACTS} | {"out": str(out)}
    for name, path in names.items():
        command = [word.replace(f"{{{name}}}", path) for word in command]
    return list(command)
