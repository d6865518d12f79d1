"""Runs on disk: JSON Lines, a header first, then one line per repetition."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any, TypeVar

from edgevlm.bench.measurement import Conditions, Measurement, Memory, Repetition, WarmUp, Workload
from edgevlm.core.config import from_mapping, read_text, to_json, to_plain
from edgevlm.core.errors import ConfigError, InputError
from edgevlm.core.files import write_text

SCHEMA_VERSION = 1
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Header:
    """The first line: what holds for every repetition, and how many follow."""

    schema: int
    num_repetitions: int
    workload: Workload
    warm_up: WarmUp
    memory: Memory
    conditions: Conditions


def write_measurement(path: Path, measurement: Measurement) -> None:
    """Write ``measurement`` to ``path``, whole or not at all."""
    write_text(path, to_jsonl(measurement))


def to_jsonl(measurement: Measurement) -> str:
    """One header line and one line per repetition."""
    header = Header(
        schema=SCHEMA_VERSION,
        num_repetitions=len(measurement.repetitions),
        workload=measurement.workload,
        warm_up=measurement.warm_up,
        memory=measurement.memory,
        conditions=measurement.conditions,
    )
    lines: list[dict[str, Any]] = [{"kind": "run", **to_plain(header)}]
    lines += [{"kind": "repetition", **to_plain(one)} for one in measurement.repetitions]
    return "".join(to_json(line, indent=None) for line in lines)


def read_measurement(path: Path) -> Measurement:
    """The run in ``path``.

    Raises InputError, naming the line, for a file that is empty, cut off, damaged or from a newer version.
    """
    lines = list(_objects(path))
    if not lines:
        raise InputError(f"{path}: the file is empty; expected a run written by `edgevlm bench --save`")
    header = _header(path, lines[0])
    repetitions = tuple(_repetition(line, f"{path}, line {at}") for at, line in enumerate(lines[1:], start=2))
    if len(repetitions) != header.num_repetitions or not repetitions:
        raise InputError(
            f"{path}, line {len(lines)}: the file ends after {len(repetitions)} of {header.num_repetitions} "
            f"repetitions; it was cut off, so measure again"
        )
    return Measurement(
        workload=header.workload,
        warm_up=header.warm_up,
        memory=header.memory,
        conditions=header.conditions,
        repetitions=repetitions,
    )


def _objects(path: Path) -> Iterator[dict[str, Any]]:
    text = read_text(path)
    for at, line in enumerate(text.removesuffix("\n").split("\n") if text else (), start=1):
        try:
            value = json.loads(line, parse_constant=_refuse_constant)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path}, line {at}: not valid JSON ({_reason(error)})") from error
        if not isinstance(value, dict):
            raise InputError(f"{path}, line {at}: expected a JSON object, found {type(value).__name__}")
        yield value


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not a number")


def _reason(error: Exception) -> str:
    return f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else str(error)


def _header(path: Path, line: Mapping[str, Any]) -> Header:
    where = f"{path}, line 1"
    if line.get("kind") != "run":
        raise InputError(f"{where}: expected the header of a run written by `edgevlm bench --save`")
    schema = line.get("schema")
    if schema != SCHEMA_VERSION:
        raise InputError(f"{where}: schema {schema!r} is not known (expected {SCHEMA_VERSION}); upgrade EdgeVLM")
    return _read(Header, line, where)


def _repetition(line: Mapping[str, Any], where: str) -> Repetition:
    if line.get("kind") != "repetition":
        raise InputError(f"{where}: expected a repetition, found {line.get('kind')!r}")
    one = _read(Repetition, line, where)
    _check_times(one, where)
    return one


def _read(kind: type[T], line: Mapping[str, Any], where: str) -> T:
    try:
        return from_mapping(kind, line, strict=False, where=where)
    except ConfigError as error:
        raise InputError(str(error)) from error


def _check_times(one: Repetition, where: str) -> None:
    times = {
        "ttft_user_ms": one.ttft_user_ms,
        "ttft_engine_ms": one.ttft_engine_ms,
        "end_to_end_ms": one.end_to_end_ms,
    }
    times |= {f"stages_ms.{name}": value for name, value in one.stages_ms.items()}
    times |= {f"token_gaps_ms[{i}]": gap for i, gap in enumerate(one.token_gaps_ms)}
    times |= {} if one.tpot_ms is None else {"tpot_ms": one.tpot_ms}
    for name, value in times.items():
        if type(value) not in (int, float) or not isfinite(value) or value < 0:
            raise InputError(f"{where}: {name} must be a time in milliseconds; found {value!r}")
