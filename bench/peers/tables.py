"""A record as Markdown: every engine, the ratios that count, and what the machine could do at most."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from bench.peers.artifacts import COLD_START_TOKENS, PREFILL_TOKENS
from bench.peers.engines import CEILINGS
from bench.peers.record import Record
from bench.peers.rounds import CEILING_FIGURES, Series
from edgevlm.bench.machine import name_of
from edgevlm.bench.stats import Ratio, median_interval, ratio_of_medians
from edgevlm.bench.table import grid

INT4, DYNAMIC, FLOAT = "edgevlm int4", "edgevlm int8-dynamic", "edgevlm fp32"
SHORT_NAMES = {
    "read_gb_per_s": "reading memory, GB/s",
    "gemm_fp32_gflop_per_s": "matrix product fp32, GFLOP/s",
    "gemm_bf16_gflop_per_s": "matrix product bf16, GFLOP/s",
}


@dataclass(frozen=True, kw_only=True)
class Claim:
    """``ours`` is at least ``times`` as fast as ``theirs`` in ``figure`` (milliseconds, less is better).

    Where several names are given, the fastest of them counts; of ours, the fastest that passed the gate.  ``per_byte``
    compares the bytes of weights read per second instead: what a kernel makes of memory, whatever its format weighs.
    Without ``times`` nothing is claimed.
    """

    section: str
    figure: str
    ours: tuple[str, ...]
    theirs: tuple[str, ...]
    times: float | None = None
    per_byte: bool = False


ENCODERS = tuple(
    f"edgevlm {name}"
    for name in ("OpenVINO bf16", "OpenVINO int8", "OpenVINO int8, rest bf16", "ONNX Runtime int8", "OpenVINO fp32")
)
WHOLE = (
    INT4,
    DYNAMIC,
    "edgevlm int8-dynamic, encoder OpenVINO int8",
    "edgevlm int4, encoder OpenVINO bf16",
)
OPENVINO_INT4 = ("OpenVINO int4 g32", "OpenVINO GenAI int4 g32")
GENAI_INT4 = ("onnxruntime-genai int4", "onnxruntime-genai int4, Generator")
CLAIMS: tuple[Claim, ...] = (
    Claim(section="text", figure="step_ms", ours=(INT4,), theirs=("llama.cpp Q4_0",), times=1.4),
    Claim(section="text", figure="step_ms", ours=(INT4,), theirs=("llama.cpp Q4_0",), per_byte=True),
    Claim(section="text", figure="step_ms", ours=(INT4,), theirs=("llama.cpp Q4_K_M",), times=1.9),
    Claim(section="text", figure="step_ms", ours=(INT4,), theirs=OPENVINO_INT4, times=1.5),
    Claim(section="text", figure="step_ms", ours=(INT4,), theirs=GENAI_INT4, times=0.95),
    Claim(section="text", figure="prefill_ms", ours=(DYNAMIC,), theirs=("OpenVINO int8",), times=1.5),
    Claim(section="text", figure="prefill_ms", ours=(DYNAMIC,), theirs=("llama.cpp Q8_0",), times=3.5),
    Claim(section="encoder", figure="encode_ms", ours=ENCODERS, theirs=("edgevlm ONNX Runtime fp32",), times=1.6),
    Claim(section="whole", figure="ttft_user_ms", ours=WHOLE, theirs=("transformers eager fp32",), times=4.0),
    Claim(section="whole", figure="ttft_user_ms", ours=WHOLE, theirs=("transformers eager bf16",), times=1.8),
)


def to_markdown(record: Record) -> str:
    """All tables of one run, with what it ran on above and what did not run below."""
    parts = [_head(record)]
    parts += [_ratios(record), _text(record), _whole(record), _encoder(record), _cold_starts(record)]
    parts += [_ceilings(record), _notes(record)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _head(record: Record) -> str:
    device, plan = record.device, record.plan
    cores = device.get("usable_cores", 0)
    found = f"{name_of(device)}, {plan.threads} threads of {cores:g} cores, {record.started}"
    rounds = ", ".join(f"{name} {section.num_rounds}" for name, section in record.sections.items())
    return (
        f"{found}.  Random weights of FastVLM-0.5B's shapes.  Rounds: {rounds}.  One value per round and engine; "
        "medians, and 95 % bootstrap intervals in brackets."
    )


def _ratios(record: Record) -> str:
    rows = [row for claim in CLAIMS if (row := _ratio_row(record, claim))]
    return _table(("EdgeVLM", "figure", "times as fast as", "wanted", "measured"), rows)


def _ratio_row(record: Record, claim: Claim) -> tuple[str, ...] | None:
    found = ratio_of(record, claim)
    if found is None:
        return None
    ours, theirs, ratio = found
    figure = claim.figure.removesuffix("_ms").replace("step", "decode") + (", bytes/s" if claim.per_byte else "")
    wanted = "-" if claim.times is None else f"{claim.times:g}"
    return (ours, figure, theirs, wanted, f"{ratio.value:.2f}{_bounds(ratio.low, ratio.high)}")


def ratio_of(record: Record, claim: Claim) -> tuple[str, str, Ratio] | None:
    """The engine of ours that counts, the one of theirs, and how many times as fast ours was; None without either."""
    series = _series(record, claim.section)
    verified = [name for name in claim.ours if verdict_of(record, name) == ""]
    ours, theirs = _fastest(series, verified, claim.figure), _fastest(series, claim.theirs, claim.figure)
    if ours is None or theirs is None:
        return None
    ratio = ratio_of_medians(series[theirs].figures[claim.figure], series[ours].figures[claim.figure])
    if not claim.per_byte:
        return ours, theirs, ratio
    ours_bytes, theirs_bytes = (series[name].about.get("read_bytes") for name in (ours, theirs))
    return (ours, theirs, _times(ratio, ours_bytes / theirs_bytes)) if ours_bytes and theirs_bytes else None


def verdict_of(record: Record, name: str) -> str:
    """Empty where the gate passed an engine of ours as it was timed, else why it counts for no ratio."""
    verdicts: Mapping[str, str] = record.gate.get("verdicts", {})
    return verdicts.get(name, "not verified on this bundle (compare.py weights --only verified.json)")


def _fastest(series: Mapping[str, Series], names: Sequence[str], figure: str) -> str | None:
    ran = [name for name in names if name in series and series[name].figures.get(figure)]
    return min(ran, key=lambda name: median(series[name].figures[figure]), default=None)


def _times(ratio: Ratio, factor: float) -> Ratio:
    low, high = (None if bound is None else bound * factor for bound in (ratio.low, ratio.high))
    return Ratio(value=ratio.value * factor, low=low, high=high)


def _text(record: Record) -> str:
    read = _ceiling(record, "text", "read_gb_per_s")
    rows = []
    for name, one in _series(record, "text").items():
        steps, prefills = one.figures.get("step_ms", []), one.figures.get("prefill_ms", [])
        if not steps or not prefills:
            continue
        rows.append(
            (
                name,
                _rate(prefills, PREFILL_TOKENS),
                _rate(steps, 1),
                _megabytes(one.about.get("read_bytes")),
                _gigabytes_per_s(one.about.get("read_bytes"), median(steps)),
                _share(one.about.get("read_bytes"), median(steps), read),
            )
        )
    header = (f"prefill of {PREFILL_TOKENS} and decode after it", "prefill tokens/s", "decode tokens/s")
    return _table((*header, "MB read per token", "GB/s", "share of bandwidth"), rows)


def _whole(record: Record) -> str:
    rows = []
    for name, one in _series(record, "whole").items():
        if not one.figures.get("ttft_user_ms"):
            continue
        tpot, engine = one.figures["tpot_ms"], one.figures.get("engine_tpot_ms")
        above = f"{100 * (1 - median(engine) / median(tpot)):.1f} %" if engine else "-"
        read = one.about.get("read_bytes")
        speed = _gigabytes_per_s(read, median(tpot))
        rows.append((name, _ms(one.figures["ttft_user_ms"]), _ms(tpot), _megabytes(read), speed, above))
    asked = record.workload
    header = (
        f"picture, question of {asked.get('question_tokens', '?')} tokens, "
        f"{record.plan.num_new_tokens} new ones (prompt {asked.get('num_prompt_tokens', '?')})"
    )
    return _table((header, "TTFT user, ms", "TPOT, ms", "MB read per token", "GB/s", "Python above the engine"), rows)


def _encoder(record: Record) -> str:
    rows = [
        (name, _ms(one.figures["encode_ms"]))
        for name, one in _series(record, "encoder").items()
        if one.figures.get("encode_ms")
    ]
    return _table(("encoder, one picture of 512 x 512 pixels", "ms"), rows)


def _cold_starts(record: Record) -> str:
    found = record.cold_starts
    if found is None or found.left_out or not found.warm:
        return ""
    names = {"opened_ms": "bundle open", "first_token_ms": "first token", "started_to_ended_ms": "whole process"}
    rows = [(name, _ms(found.warm[key]), _ms(found.from_disk[key])) for key, name in names.items()]
    table = _table((f"new process, prompt of {COLD_START_TOKENS} tokens", "files in memory, ms", "from disk, ms"), rows)
    return f"{table}\n\n{_memory(found.memory)}"


def _memory(memory: Mapping[str, int]) -> str:
    """The peak, and how much of it is neither weights nor cache; mapped rows are in no memory until they are read."""
    peak, known = memory["peak_pss_bytes"], memory["weights_bytes"] + memory["cache_bytes"]
    return (
        f"Peak memory {peak / 2**20:.0f} MiB PSS (VmHWM {memory.get('vmhwm_bytes', 0) / 2**20:.0f} MiB; at the end "
        f"{memory.get('pss_anon_bytes', 0) / 2**20:.0f} MiB of its own, {memory.get('pss_file_bytes', 0) / 2**20:.0f} "
        f"MiB mapped files): weights {memory['weights_bytes'] / 2**20:.0f} + cache "
        f"{memory['cache_bytes'] / 2**20:.0f} + {(peak - known) / 2**20:.0f} MiB.  The embedding's file "
        f"({memory['mapped_bytes'] / 2**20:.0f} MiB) is mapped, not loaded, and not counted as weights."
    )


def _ceilings(record: Record) -> str:
    rows = []
    for figure in CEILING_FIGURES:
        values = [value for name in record.sections for value in _values(record, name, figure)]
        if values:
            rows.append((SHORT_NAMES[figure], f"{median(values):.0f}", f"{min(values):.0f} - {max(values):.0f}"))
    return _table(("the machine's ceilings, measured between the engines", "median", "range"), rows)


def _notes(record: Record) -> str:
    left_out = [f"- not measured: {name}: {why}" for name, why in _left_out(record)]
    left_out += [f"- counts for no ratio: {name}: {why}" for name, why in _unverified(record)]
    if not (record.gate.get("passed") and all(record.gate.get("variants_passed", ()))):
        left_out.append("- EdgeVLM's bundle did not pass its gate: random weights only show an order of precisions")
    if record.other_load and record.other_load > 0.05:
        left_out.append(f"- other programs used {100 * record.other_load:.0f} % of the processors")
    return "\n".join(left_out)


def _unverified(record: Record) -> Iterator[tuple[str, str]]:
    """Engines of ours that were measured, would count, and did not pass the gate."""
    for name in dict.fromkeys(
        name for claim in CLAIMS for name in claim.ours if name in _series(record, claim.section)
    ):
        if why := verdict_of(record, name):
            yield name, why


def _left_out(record: Record) -> Iterator[tuple[str, str]]:
    for section in record.sections.values():
        yield from section.left_out.items()
    if record.cold_starts and record.cold_starts.left_out:
        yield "cold start", record.cold_starts.left_out


def _series(record: Record, section: str) -> dict[str, Series]:
    found = record.sections.get(section)
    return {name: one for name, one in found.series.items() if name != CEILINGS.name} if found else {}


def _values(record: Record, section: str, figure: str) -> list[float]:
    found = record.sections[section].series.get(CEILINGS.name)
    return found.figures.get(figure, []) if found else []


def _ceiling(record: Record, section: str, figure: str) -> float | None:
    values = _values(record, section, figure) if section in record.sections else []
    return median(values) if values else None


def _share(read_bytes: int | None, step_ms: float, gb_per_s: float | None) -> str:
    """Bytes read per token, over the time that reading them takes at full speed."""
    if not read_bytes or not gb_per_s:
        return "-"
    return f"{100 * read_bytes / 1e6 / step_ms / gb_per_s:.0f} %"


def _megabytes(num_bytes: int | None) -> str:
    return f"{num_bytes / 1e6:.0f}" if num_bytes else "-"


def _gigabytes_per_s(num_bytes: int | None, step_ms: float) -> str:
    """Weights read per second of decoding: tokens/s times the bytes of one."""
    return f"{num_bytes / 1e6 / step_ms:.1f}" if num_bytes else "-"


def _rate(times_ms: list[float], num_tokens: int) -> str:
    low, high = median_interval(times_ms)
    bounds = _bounds(1000 * num_tokens / high, 1000 * num_tokens / low, 1) if low and high else ""
    return f"{1000 * num_tokens / median(times_ms):.1f}{bounds}"


def _ms(times_ms: list[float]) -> str:
    return f"{median(times_ms):.1f}{_bounds(*median_interval(times_ms), 1)}"


def _bounds(low: float | None, high: float | None, digits: int = 2) -> str:
    return "" if low is None or high is None else f" [{low:.{digits}f}, {high:.{digits}f}]"


def _table(header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    return "\n".join(grid(header, rows)) if rows else ""
