"""The four verbs of the comparison: setup, weights, run and table."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from bench.peers import artifacts, environments, record, tables
from bench.peers.cold_starts import run_cold_starts
from bench.peers.engines import ENGINES, SECTIONS, Engine
from bench.peers.rounds import Plan, run_section
from edgevlm.bench.machine import watch_other_load

RESULT = environments.ROOT / "bench" / "results" / "peers.json"
ALL_SECTIONS = (*SECTIONS, "cold")


def main(words: list[str] | None = None) -> None:
    """Parse and do one of the four."""
    options = _parser().parse_args(words)
    options.folder = options.folder.resolve()
    {"setup": _setup, "weights": _weights, "run": _run, "table": _table}[options.verb](options)


def _setup(options: argparse.Namespace) -> None:
    """Every environment that lacks something, or those of --only; says what each one still lacks otherwise."""
    options.folder.mkdir(parents=True, exist_ok=True)
    for name in environments.ENVIRONMENTS:
        if options.only and not _named(name, options.only):
            continue
        if lacking := environments.missing(name, options.folder):
            note = environments.ENVIRONMENTS[name].note
            _say(f"{name}: installing {', '.join(lacking)}{f' ({note})' if note else ''}")
            environments.set_up(name, options.folder)
        print(f"{name}: ready")


def _weights(options: argparse.Namespace) -> None:
    """Every file that is not there yet; those that --only names are made anew."""
    for artifact in artifacts.ARTIFACTS:
        path = options.folder / "weights" / artifact.name
        if options.only and not _named(artifact.name, options.only):
            continue
        if path.exists() and not options.only:
            print(f"{path}: there")
            continue
        _say(f"making {artifact.name}")
        print(artifacts.make(artifact, options.folder))


def _run(options: argparse.Namespace) -> None:
    """Measure section after section, and write down each as it ends."""
    plan = Plan(
        rounds=options.rounds,
        threads=options.threads,
        num_steps=options.steps,
        num_new_tokens=options.new_tokens,
        seconds=options.seconds,
    )
    bundle = options.folder / "weights" / artifacts.BUNDLE
    found = record.begin(plan, artifacts.read_workload(options.folder), record.read_gate(bundle))
    with watch_other_load() as load:
        for section in (section for section in SECTIONS if section in options.sections):
            engines = [engine for engine in ENGINES if engine.section == section and _wanted(engine, options.only)]
            found.sections[section] = run_section(section, engines, options.folder, plan, _say)
            record.write_record(found, options.out)
        if "cold" in options.sections:
            found.cold_starts = run_cold_starts(options.folder, plan, "int4", _say)
    found.other_load = load.share
    record.write_record(found, options.out)
    print(tables.to_markdown(found))
    _say(f"{options.out}")


def _table(options: argparse.Namespace) -> None:
    print(tables.to_markdown(record.read_record(options.record)))


def _wanted(engine: Engine, only: list[str]) -> bool:
    return not only or _named(engine.name, only)


def _named(name: str, only: list[str]) -> bool:
    return any(word.lower() in name.lower() for word in only)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="EdgeVLM beside its peers, turn by turn.")
    verbs = parser.add_subparsers(dest="verb", required=True)
    for name, help in (("setup", "create environments"), ("weights", "make files"), ("run", "measure")):
        verb = verbs.add_parser(name, help=help)
        verb.add_argument(
            "--folder", type=Path, default=environments.ROOT / "runs" / "peers", help="environments and files"
        )
        verb.add_argument("--only", nargs="+", default=[], metavar="NAME", help="those whose name has one of these")
        if name == "run":
            _add_run_options(verb)
    table = verbs.add_parser("table", help="print the tables of a record")
    table.add_argument("record", type=Path)
    table.set_defaults(folder=Path())
    return parser


def _add_run_options(verb: argparse.ArgumentParser) -> None:
    default = Plan()
    verb.add_argument("--out", type=Path, default=RESULT, help="the record to write")
    verb.add_argument("--sections", nargs="+", choices=ALL_SECTIONS, default=list(ALL_SECTIONS))
    verb.add_argument("--rounds", type=int, default=default.rounds)
    verb.add_argument("--threads", type=int, default=default.threads)
    verb.add_argument("--steps", type=int, default=default.num_steps, help="decoded tokens per round")
    verb.add_argument("--new-tokens", type=int, default=default.num_new_tokens, help="length of a whole answer")
    verb.add_argument("--seconds", type=float, default=default.seconds, help="at most, for the rounds of a section")
