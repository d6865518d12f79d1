"""transformers' FastVLM in PyTorch, eager: a whole question about a picture, and its encoder alone.

The loop calls the model's forward itself, which is faster than ``generate``; the prompt's ids are given, so that the
tokenizer costs nothing.  Both are in its favour.
"""

from __future__ import annotations

from collections.abc import Mapping
from io import BytesIO
from time import perf_counter_ns
from typing import Any

import torch
import transformers
from PIL import Image

from bench.peers.torchvision_operators import define_missing_operators
from bench.peers.workers.serving import Answer, Serving, serve, since_ms
from edgevlm.bench.workload import scene_pictures


class FastVlm:
    """The model, its image processor and a series of new pictures."""

    def __init__(self, folder: str, dtype: str, threads: int) -> None:
        torch.set_num_threads(threads)
        self._model: Any = transformers.FastVlmForConditionalGeneration.from_pretrained(
            folder, dtype=getattr(torch, dtype), attn_implementation="sdpa"
        )
        self._model.train(False)
        self.read_bytes = bytes_per_token(self._model)
        self._processor = transformers.CLIPImageProcessorPil.from_pretrained(folder)
        self._pictures = scene_pictures(self._processor.crop_size["height"])

    @torch.inference_mode()
    def whole(self, request: Mapping[str, Any]) -> Answer:
        """From a file's bytes to the last token, by the definitions of EdgeVLM's own clock."""
        picture = next(self._pictures).source
        started = perf_counter_ns()
        pixel_values = self._pixels(picture)
        ids, cache = torch.tensor([request["prompt_ids"]]), transformers.DynamicCache()
        token = self._next(cache, input_ids=ids, pixel_values=pixel_values)
        ttft_ms, tokens, first = since_ms(started), [token], perf_counter_ns()
        for _ in range(request["num_new_tokens"] - 1):
            token = self._next(cache, input_ids=torch.tensor([[token]]))
            tokens.append(token)
        tpot_ms = since_ms(first) / (request["num_new_tokens"] - 1)
        return {"ttft_user_ms": ttft_ms, "tpot_ms": tpot_ms, "num_prompt_tokens": ids.shape[1], "tokens": tokens}

    @torch.inference_mode()
    def encoder(self, request: Mapping[str, Any]) -> Answer:
        """The tower and the projector, on pixels that are ready."""
        pixel_values = self._pixels(next(self._pictures).source)
        started = perf_counter_ns()
        self._model.model.get_image_features(pixel_values=pixel_values)
        return {"encode_ms": since_ms(started)}

    def _pixels(self, picture: Any) -> torch.Tensor:
        image = Image.open(BytesIO(picture)).convert("RGB")
        values: torch.Tensor = self._processor(image, return_tensors="pt")["pixel_values"]
        return values.to(self._model.dtype)

    def _next(self, cache: Any, **inputs: Any) -> int:
        output = self._model(**inputs, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return int(output.logits[0, -1].argmax())


def bytes_per_token(model: Any) -> int:
    """The decoder and its head, the embedding's row aside."""
    decoder, head = model.model.language_model, model.get_output_embeddings().weight
    total = sum(parameter.nbytes for parameter in decoder.parameters())
    return int(total - decoder.get_input_embeddings().weight.nbytes + head.nbytes)


def load(arguments: Mapping[str, Any]) -> Serving:
    """``model``: the folder of a checkpoint; ``dtype``: float32 or bfloat16."""
    engine = FastVlm(arguments["model"], arguments["dtype"], arguments["threads"])
    versions = f"{transformers.__version__} (torch {torch.__version__})"
    return Serving(
        {"whole": engine.whole, "encoder": engine.encoder}, {"version": versions, "read_bytes": engine.read_bytes}
    )


if __name__ == "__main__":
    define_missing_operators()
    serve(load)
