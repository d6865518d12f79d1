"""EdgeVLM beside its peers: the same random weights, the same prompts, turn by turn on one machine.

    python bench/peers/compare.py setup    # the peers' own environments
    python bench/peers/compare.py weights  # their files, from one random checkpoint
    python bench/peers/compare.py run      # measure, write a record, print its tables
    python bench/peers/compare.py table RECORD

Run it with the interpreter of EdgeVLM's own environment (workshop and openvino extras).  ``--folder`` holds
environments and files, some 25 GB; measure on a machine that does nothing else.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the checkout: this room is not installed
    from bench.peers.command import main

    main()
