"""Which of EdgeVLM's engines, as they are timed, pass the gate of their bundle.

    python -m bench.peers.makers.verified BUNDLE OUT

OUT holds a verdict for every engine: empty where it passed, else why not; and which bundle was judged.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench.peers.bundles import choices_of, fingerprint, read_manifest
from bench.peers.engines import ENGINES
from edgevlm.core.config import to_json
from edgevlm.core.errors import EdgeVLMError
from edgevlm.core.files import write_text
from edgevlm.runtimes.choices import Wishes
from edgevlm.verify import verify_bundle


def main(bundle: Path, out: Path) -> None:
    """Each combination once."""
    verdicts: dict[str, str] = {}
    asked = {engine.name: engine.arguments for engine in ENGINES if engine.worker == "edgevlm_bundle"}
    for name, arguments in asked.items():
        verdicts[name] = verdict(bundle, arguments)
        print(f"{name}: {verdicts[name] or 'passed'}", flush=True)
    write_text(out, to_json({"bundle": fingerprint(bundle), "verdicts": verdicts}))


def verdict(bundle: Path, arguments: Mapping[str, Any]) -> str:
    """Empty where a bundle opened so passes; else the first broken stage, or why it does not open."""
    try:
        choices: dict[str, Any] = choices_of(arguments, read_manifest(bundle))
        verify_bundle(bundle, Wishes(**choices), check=False).require()
    except (EdgeVLMError, SystemExit) as error:
        return str(error)
    return ""


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
