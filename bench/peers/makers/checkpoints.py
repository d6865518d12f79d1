"""The random checkpoints: ``whole OUT``, then ``text WHOLE OUT``."""

from __future__ import annotations

import sys
from pathlib import Path

from bench.peers.checkpoint import write_checkpoint, write_text_model

if __name__ == "__main__":
    kind, *folders = sys.argv[1:]
    if kind == "whole":
        write_checkpoint(Path(folders[0]))
    else:
        write_text_model(Path(folders[0]), Path(folders[1]))
