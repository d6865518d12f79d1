"""``edgevlm targets``: where a model can go, and what can run it here."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module

import typer

from edgevlm.cli.console import Json, print_json
from edgevlm.cli.opening import TORCH
from edgevlm.core.optional import fix_command, is_installed
from edgevlm.core.registry import Registry

NEEDS = {  # the libraries behind each name; what another package brings is listed without
    "onnx": ("torch", "onnx", "onnx_ir"),
    "onnxruntime": ("onnxruntime",),
    "openvino": ("openvino",),
    "openvino-bf16": ("openvino",),
    "torch": ("torch",),
}
NOTES = {
    "onnx": "verified against PyTorch at the end of every export",
    "onnxruntime": "run on CPU; no other processor has been tried",
    "openvino": "run on an x86 CPU, in float32",
    "openvino-bf16": "run on an x86 CPU with bfloat16 instructions, which it needs",
    "torch": "run on CPU, in float32; takes the checkpoint in place of the bundle (run, bench, eval)",
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
        typer.echo(f"{entry.kind:14} {entry.name:14} {state}" + (f"   {entry.note}" if entry.note else ""))


def list_entries() -> list[Entry]:
    """Every target and runtime by name; nothing that they need is imported."""
    targets, runtimes = _registry("edgevlm.export", "TARGETS"), _registry("edgevlm.runtimes.open", "RUNTIMES")
    listed = [_entry(registry.kind, name) for registry in (targets, runtimes) for name in registry]
    return [*listed, _entry(runtimes.kind, TORCH)]


def _registry(module: str, name: str) -> Registry[object]:
    found: Registry[object] = getattr(import_module(module), name)
    return found


def _entry(kind: str, name: str) -> Entry:
    missing = [library for library in NEEDS.get(name, ()) if not is_installed(library)]
    fix = fix_command(missing[0]) if missing else None
    return Entry(kind=kind, name=name, installed=not missing, fix=fix, note=NOTES.get(name, ""))
