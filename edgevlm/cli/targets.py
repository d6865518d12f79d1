"""``edgevlm targets``: where a model can go, and what can run it here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module

import typer

from edgevlm.cli.console import Json, print_json
from edgevlm.cli.opening import TORCH
from edgevlm.core.optional import fix_command, is_installed
from edgevlm.core.registry import Registry

TARGET, RUNTIME = "export target", "runtime"
NEEDS: Mapping[tuple[str, str], tuple[str, ...]] = {  # the libraries behind each; of other packages' nothing is known
    (TARGET, "onnx"): ("torch", "onnx", "onnx_ir"),
    (TARGET, "tensorrt"): ("torch", "onnx", "onnx_ir"),
    (RUNTIME, "onnxruntime"): ("onnxruntime",),
    (RUNTIME, "openvino"): ("openvino",),
    (RUNTIME, "openvino-bf16"): ("openvino",),
    (RUNTIME, "tensorrt"): ("tensorrt", "cuda"),
    (RUNTIME, "tensorrt-on-cpu"): ("onnxruntime", "onnx"),
    (RUNTIME, "torch"): ("torch",),
}
SAME = {"tensorrt": ("tensorrt_rtx", "tensorrt_bindings")}  # what does as well
NOTES: Mapping[tuple[str, str], str] = {
    (TARGET, "onnx"): "verified against PyTorch at the end of every export",
    (TARGET, "tensorrt"): "verified on the CPU at the end of every export; `edgevlm build` makes engines on the device",
    (RUNTIME, "onnxruntime"): "run on CPU; no other processor has been tried",
    (RUNTIME, "openvino"): "run on an x86 CPU, in float32",
    (RUNTIME, "openvino-bf16"): "run on an x86 CPU with bfloat16 instructions, which it needs",
    (RUNTIME, "tensorrt"): "not run on hardware yet",
    (RUNTIME, "tensorrt-on-cpu"): "proves bundles for TensorRT without a GPU, rounding as their graphs say; slow",
    (RUNTIME, "torch"): "run on CPU, in float32; takes the checkpoint in place of the bundle (run, bench, eval)",
}


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One export target or runtime: is what it needs installed, the command if not, and how far it is."""

    kind: str
    name: str
    installed: bool
    fix: str | None
    note: str


def command(json: Json = False) -> None:
    """List export targets and runtimes, whether what they need is installed, and how far each is tried."""
    entries = list_entries()
    if json:
        print_json(entries)
        return
    for entry in entries:
        state = "installed" if entry.installed else f"needs: {entry.fix}"
        typer.echo(f"{entry.kind:14} {entry.name:16} {state}" + (f"   {entry.note}" if entry.note else ""))


def list_entries() -> list[Entry]:
    """Every target and runtime by name; nothing that they need is imported."""
    targets, runtimes = _registry("edgevlm.export", "TARGETS"), _registry("edgevlm.runtimes.open", "RUNTIMES")
    listed = [_entry(registry.kind, name) for registry in (targets, runtimes) for name in registry]
    return [*listed, _entry(runtimes.kind, TORCH)]


def _registry(module: str, name: str) -> Registry[object]:
    found: Registry[object] = getattr(import_module(module), name)
    return found


def _entry(kind: str, name: str) -> Entry:
    missing = [library for library in NEEDS.get((kind, name), ()) if not any(map(is_installed, _ways_to(library)))]
    fix = fix_command(missing[0]) if missing else None
    return Entry(kind=kind, name=name, installed=not missing, fix=fix, note=NOTES.get((kind, name), ""))


def _ways_to(library: str) -> tuple[str, ...]:
    return (library, *SAME.get(library, ()))
