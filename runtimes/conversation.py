"""Talk to a bundle: stream an answer, stop it early, and hold a conversation that reuses the kv cache.

    python runtimes/conversation.py

Uses the shipped bundle and picture, and nothing that the base install does not bring.
"""

from __future__ import annotations

import edgevlm
from edgevlm.runtimes.sampling import Sampling
from edgevlm.runtimes.vlm import RuntimeVlm
from edgevlm.shipped import DEMO_IMAGE


def main() -> None:
    """Three ways to ask."""
    with edgevlm.open_bundle("nano", runtime="onnxruntime") as vlm:
        stream_an_answer(vlm)
        stop_an_answer(vlm)
        hold_a_conversation(vlm)


def stream_an_answer(vlm: RuntimeVlm) -> None:
    """Pieces of text arrive while the model is still writing; never half a character."""
    stream = vlm.stream(DEMO_IMAGE, "Describe the picture.", max_tokens=48)
    for piece in stream:
        print(piece, end="", flush=True)
    timings = stream.answer.timings
    print(f"\n  first text after {timings.ttft_user_ms:.0f} ms, {len(stream.answer.token_ids)} tokens")


def stop_an_answer(vlm: RuntimeVlm) -> None:
    """`cancel` may be called from any thread: the answer ends after at most one more token."""
    stream = vlm.stream(DEMO_IMAGE, "Describe the picture.", sampling=Sampling(temperature=0.7, seed=1))
    print(next(stream), end="")
    stream.cancel()
    print(f"  ... finish reason: {stream.read().finish_reason}")


def hold_a_conversation(vlm: RuntimeVlm) -> None:
    """The image and the earlier turns stay in the kv cache; only what is new is computed."""
    chat = vlm.chat()
    first = chat.say("How many objects are there?", image=DEMO_IMAGE).read()
    second = chat.say("Describe the picture.").read()
    for answer in (first, second):
        print(f"{answer.text}  (cached tokens: {answer.num_cached_tokens} of {answer.num_prompt_tokens})")


if __name__ == "__main__":
    main()
