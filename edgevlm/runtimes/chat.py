"""Several questions in a row, each prompt beginning like the one before."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgevlm.processing.chat import Message, user_message
from edgevlm.processing.images import ImageSource
from edgevlm.processing.picture import Picture
from edgevlm.runtimes import MAX_TOKENS
from edgevlm.runtimes.answer import Answer, AnswerStream, Request, stop_strings
from edgevlm.runtimes.sampling import GREEDY, Sampling
from edgevlm.runtimes.video import Video

if TYPE_CHECKING:
    from edgevlm.runtimes.vlm import RuntimeVlm


@dataclass(frozen=True, eq=False)
class Conversation:
    """What was said, and the pictures that the messages refer to, in order."""

    messages: tuple[Message, ...] = ()
    pictures: tuple[Picture, ...] = ()

    def question(self, prompt: str, picture: Picture | None) -> Conversation:
        """This conversation and a question, whose picture comes before its text."""
        pictures = () if picture is None else (picture,)
        asked = user_message(prompt, num_images=len(pictures))
        return Conversation((*self.messages, asked), (*self.pictures, *pictures))

    def answer(self, text: str) -> Conversation:
        """This conversation and an answer."""
        return Conversation((*self.messages, {"role": "assistant", "content": text}), self.pictures)


class Chat:
    """A conversation with a model.

    Each turn computes only the rows of the prompt that the kv cache does not hold yet.  Other questions to
    the same model may come between two turns; they only cost the reuse.  Where activations are quantized per
    call (dynamic int8), the logits after a reuse differ slightly from those of a whole prefill.
    """

    def __init__(self, vlm: RuntimeVlm) -> None:
        self._vlm = vlm
        self._conversation = Conversation()

    @property
    def messages(self) -> tuple[Message, ...]:
        """All turns that were answered, as a chat template reads them."""
        return self._conversation.messages

    def say(
        self,
        prompt: str,
        image: ImageSource | Video | None = None,
        *,
        max_tokens: int = MAX_TOKENS,
        sampling: Sampling = GREEDY,
        stop: str | Sequence[str] = (),
        use_image_cache: bool = True,
    ) -> AnswerStream:
        """The answer to the next question, piece by piece.

        A turn is remembered once its stream has ended, also when it was cancelled; not when it was closed.
        Raises what ``RuntimeVlm.ask`` raises; DoesNotFitError when all that was said exceeds the context.
        """
        request = Request(
            prompt=prompt,
            max_tokens=max_tokens,
            sampling=sampling,
            stop=stop_strings(stop),
            use_image_cache=use_image_cache,
        )
        return self._vlm.begin(request, image, self._conversation, reuse=True, on_end=self._remember)

    def ask(
        self,
        prompt: str,
        image: ImageSource | Video | None = None,
        *,
        max_tokens: int = MAX_TOKENS,
        sampling: Sampling = GREEDY,
        stop: str | Sequence[str] = (),
        use_image_cache: bool = True,
    ) -> Answer:
        """The whole answer to the next question; what ``say`` gives piece by piece."""
        stream = self.say(
            prompt, image, max_tokens=max_tokens, sampling=sampling, stop=stop, use_image_cache=use_image_cache
        )
        return stream.read()

    def reset(self) -> None:
        """Forget everything said."""
        self._conversation = Conversation()

    def _remember(self, conversation: Conversation) -> None:
        self._conversation = conversation
