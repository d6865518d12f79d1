"""transformers' Qwen2 in PyTorch: eager with its growing cache, or compiled with a static one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

import torch
import transformers

from bench.peers.torchvision_operators import define_missing_operators
from bench.peers.workers.serving import Serving, Work, serve, text_work

MOST_ROWS = 512


class Eager:
    """As ``generate`` calls it: scaled dot-product attention, the head for the last position alone."""

    def __init__(self, model: Any) -> None:
        self._model, self._cache = model, transformers.DynamicCache()
        self.read_bytes = bytes_per_token(model)

    def prefill(self, token_ids: Sequence[int]) -> int:
        self._cache = transformers.DynamicCache()
        return self._next(token_ids)

    def step(self, token: int) -> int:
        return self._next([token])

    @torch.inference_mode()
    def _next(self, token_ids: Sequence[int]) -> int:
        ids = torch.tensor([token_ids])
        output = self._model(input_ids=ids, past_key_values=self._cache, use_cache=True, logits_to_keep=1)
        return int(output.logits[0, -1].argmax())


class Compiled:
    """A static cache, and a step compiled by ``torch.compile`` before it is timed; the prompt runs eager.

    That is how ``generate`` divides the work: only steps have the same shapes every time.
    """

    def __init__(self, model: Any) -> None:
        self._prompt: Any = model.forward
        self._step: Any = torch.compile(model.forward, dynamic=False)
        self._cache: Any = transformers.StaticCache(config=model.config, max_cache_len=MOST_ROWS)
        self._position = 0
        self.read_bytes = bytes_per_token(model)

    def prefill(self, token_ids: Sequence[int]) -> int:
        self._cache.reset()
        self._position = 0
        return self._next(self._prompt, token_ids)

    def step(self, token: int) -> int:
        return self._next(self._step, [token])

    @torch.no_grad()  # a cache made in inference mode could not be emptied outside of it
    def _next(self, forward: Any, token_ids: Sequence[int]) -> int:
        start = self._position
        self._position = end = start + len(token_ids)
        places = torch.arange(start, end)[None]
        output = forward(
            input_ids=torch.tensor([token_ids]),
            position_ids=places,
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return int(output.logits[0, -1].argmax())


def bytes_per_token(model: Any) -> int:
    """All parameters but the embedding's, whose rows are looked up; a tied head is read."""
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    total = sum(parameter.nbytes for parameter in model.parameters())
    return int(total if embedding is head else total - embedding.nbytes)


def load(arguments: Mapping[str, Any]) -> Serving:
    """``model``: the folder of a checkpoint; ``dtype``: float32 or bfloat16.  Requests go to one ``mode`` of two."""
    torch.set_num_threads(arguments["threads"])
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(
        arguments["model"], dtype=getattr(torch, arguments["dtype"]), attn_implementation="sdpa"
    )
    model.eval()
    modes = {"eager": text_work(Eager(model))["text"], "compile": text_work(Compiled(model))["text"]}
    about = {
        "version": f"{version('transformers')} (torch {version('torch')})",
        "read_bytes": bytes_per_token(model),
    }
    return Serving({"text": _by_mode(modes)}, about)


def _by_mode(modes: Mapping[str, Work]) -> Work:
    return lambda request: modes[request["mode"]](request)


if __name__ == "__main__":
    define_missing_operators()
    serve(load)
