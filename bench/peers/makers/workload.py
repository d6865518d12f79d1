"""What every engine is asked, from the bundle's own tokenizer and template.

python -m bench.peers.makers.workload BUNDLE OUT
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import edgevlm
from bench.peers.artifacts import QUESTION_TOKENS
from edgevlm.bench.workload import PROMPT, prompt_of_length, prompt_tokens, scene_grid
from edgevlm.processing.chat import user_message


def main(bundle: Path, out: Path) -> None:
    """A question of ``QUESTION_TOKENS`` tokens about one picture, and the ids of the whole prompt."""
    with edgevlm.open_bundle(bundle) as vlm:
        grid = scene_grid(vlm)
        own = len(vlm.processor.tokenizer.encode(PROMPT))
        around = prompt_tokens(vlm, PROMPT, grid) - own
        question = prompt_of_length(vlm, around + QUESTION_TOKENS)
        ids = vlm.processor.input_ids([user_message(question, num_images=1)], grids=[grid])
    workload = {
        "question": question,
        "question_tokens": len(ids) - around,
        "prompt_ids": [int(id) for id in ids],
        "num_vision_tokens": int((ids == vlm.processor.image_token_id).sum()),
    }
    out.write_text(json.dumps(workload), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
