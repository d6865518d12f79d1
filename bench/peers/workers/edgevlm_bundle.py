"""EdgeVLM on a bundle: its decoder alone, its encoder alone, or a whole question about a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from time import perf_counter_ns
from typing import Any

import numpy as np

import edgevlm
from bench.overhead import EngineClock
from bench.peers.bundles import DECODER, choices_of, chosen, read_manifest
from bench.peers.workers.serving import Answer, Serving, Work, serve, since_ms, text_work
from edgevlm.bench.workload import scene_pictures
from edgevlm.bundle.manifest import Manifest
from edgevlm.runtimes.session import Session
from edgevlm.runtimes.vlm import RuntimeVlm


class Decoder:
    """The session's prefill and decode, and an argmax."""

    def __init__(self, session: Session, read_bytes: int) -> None:
        self._session, self.read_bytes = session, read_bytes

    def prefill(self, token_ids: Sequence[int]) -> int:
        self._session.rewind(0)
        return int(self._session.prefill(self._session.embed(np.asarray([token_ids], np.int64))).argmax())

    def step(self, token: int) -> int:
        return int(self._session.decode(token).argmax())


def load(arguments: Mapping[str, Any]) -> Serving:
    """``model``: a bundle; runtimes and precisions as ``open_bundle`` takes them."""
    manifest = read_manifest(arguments["model"])
    choices: dict[str, Any] = choices_of(arguments, manifest)
    vlm = edgevlm.open_bundle(arguments["model"], threads=arguments["threads"], huge_pages=True, **choices)
    files = chosen(manifest, DECODER, choices.get("decoder_precision")).files
    decoder = Decoder(vlm.session, sum(manifest.file_bytes[name] for name in files))
    work = {**text_work(decoder), **_encoder_work(vlm), **_whole_work(vlm, runs_per_step(manifest))}
    about = {"version": edgevlm.__version__, "read_bytes": decoder.read_bytes, "info": vlm.info}
    return Serving(work, about)


def _encoder_work(vlm: RuntimeVlm) -> dict[str, Work]:
    size = (vlm.processor.image_spec.height, vlm.processor.image_spec.width)
    pixel_values = np.random.default_rng(0).random((1, 3, *size), np.float32)

    def encoder(request: Mapping[str, Any]) -> Answer:
        started = perf_counter_ns()
        vlm.session.encode(pixel_values)
        return {"encode_ms": since_ms(started)}

    return {"encoder": encoder}


def _whole_work(vlm: RuntimeVlm, num_runs: int) -> dict[str, Work]:
    """A question about a picture that the model has not seen, from the file's bytes to the last token."""
    spec = vlm.processor.image_spec
    pictures = scene_pictures(max(spec.height, spec.width))

    def whole(request: Mapping[str, Any]) -> Answer:
        picture = next(pictures)
        with EngineClock() as engine:
            answer = vlm.ask(
                picture.source,
                request["question"],
                max_tokens=request["num_new_tokens"],
                use_image_cache=False,
                ignore_eos=True,
            )
        times, num_steps = answer.timings, len(answer.token_ids) - 1
        return {
            "ttft_user_ms": times.ttft_user_ms,
            "ttft_engine_ms": times.ttft_engine_ms,
            "tpot_ms": times.tpot_ms,
            "engine_tpot_ms": engine_step_ms(engine.runs_ms, num_steps, num_runs),
            "encode_ms": times.stages_ms["vision"],
            "num_prompt_tokens": answer.num_prompt_tokens,
            "tokens": list(answer.token_ids),
        }

    return {"whole": whole}


def runs_per_step(manifest: Manifest) -> int:
    """The decoder's graph, and the embedding's where its rows do not lie open."""
    return 1 if chosen(manifest, "embed_tokens", None).table else 2


def engine_step_ms(runs_ms: Sequence[float], num_steps: int, num_runs: int) -> float | None:
    """What ONNX Runtime took per step, of the last ``num_steps`` of ``num_runs`` each; None where it did not decode."""
    last = num_steps * num_runs
    return sum(runs_ms[-last:]) / num_steps if 0 < last < len(runs_ms) else None


if __name__ == "__main__":
    serve(load)
