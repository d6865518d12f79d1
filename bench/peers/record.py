"""One run of the comparison as data, kept as it was measured."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from bench.peers.artifacts import VERIFIED
from bench.peers.bundles import fingerprint
from bench.peers.cold_starts import ColdStarts
from bench.peers.rounds import Plan, Section, Series
from edgevlm.bench import machine
from edgevlm.core.config import to_json
from edgevlm.core.files import write_text

SCHEMA = 2


@dataclass
class Record:
    """Everything that a table needs, and everything that explains it."""

    plan: Plan
    device: Mapping[str, Any]
    versions: Mapping[str, str]
    started: str
    workload: Mapping[str, Any]
    gate: Mapping[str, Any]
    other_load: float | None = None
    sections: dict[str, Section] = field(default_factory=dict)
    cold_starts: ColdStarts | None = None
    schema: int = SCHEMA


def begin(plan: Plan, workload: Mapping[str, Any], gate: Mapping[str, Any]) -> Record:
    """A record of this machine at this time, with nothing measured yet."""
    return Record(
        plan=plan,
        device=machine.device(),
        versions=machine.versions(),
        started=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        workload={name: value for name, value in workload.items() if name != "prompt_ids"}
        | {"num_prompt_tokens": len(workload.get("prompt_ids", ()))},
        gate=gate,
    )


def read_gate(bundle: Path) -> dict[str, Any]:
    """Whether the bundle that was timed passed its gate (None where it says nothing), and every engine's verdict."""
    file, verdicts = bundle / "verify.json", _read_verdicts(bundle)
    if not file.is_file():
        return {"passed": None, "verdicts": verdicts}
    verification = json.loads(file.read_text(encoding="utf-8"))
    variants = [bool(one.get("passed")) for one in verification.get("variants", ())]
    return {"passed": bool(verification.get("passed")), "variants_passed": variants, "verdicts": verdicts}


def _read_verdicts(bundle: Path) -> dict[str, str]:
    """What ``makers/verified.py`` found, by engine; empty where it judged no bundle or another one."""
    file = bundle.with_name(VERIFIED)
    if not file.is_file() or not bundle.is_dir():
        return {}
    found = json.loads(file.read_text(encoding="utf-8"))
    return dict(found["verdicts"]) if found["bundle"] == fingerprint(bundle) else {}


def write_record(record: Record, file: Path) -> None:
    """The record as JSON; the file appears only when it is whole."""
    file.parent.mkdir(parents=True, exist_ok=True)
    write_text(file, to_json(asdict(record)))


def read_record(file: Path) -> Record:
    """What ``write_record`` wrote."""
    values = json.loads(file.read_text(encoding="utf-8"))
    if values["schema"] != SCHEMA:
        raise SystemExit(f"{file} is of schema {values['schema']}, expected {SCHEMA}: measure again")
    values["plan"] = Plan(**values["plan"])
    values["sections"] = {name: _section(section) for name, section in values["sections"].items()}
    values["cold_starts"] = ColdStarts(**values["cold_starts"]) if values["cold_starts"] else None
    return Record(**values)


def _section(values: Mapping[str, Any]) -> Section:
    series = {name: Series(**one) for name, one in values["series"].items()}
    return Section(series=series, left_out=values["left_out"], num_rounds=values["num_rounds"])
