"""A model that answers questions about images: processor, session and the generation loop, put together."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import takewhile
from threading import Event, Lock
from types import TracebackType
from typing import Any

from edgevlm.bundle.manifest import FusionShape
from edgevlm.core.errors import ConfigError, DoesNotFitError, UnsupportedError, UsageError
from edgevlm.processing.images import ImageSource, load_image
from edgevlm.processing.picture import Picture
from edgevlm.processing.processor import Processor
from edgevlm.runtimes import MAX_TOKENS
from edgevlm.runtimes.answer import Answer, AnswerStream, FinishReason, Request, stop_strings
from edgevlm.runtimes.chat import Chat, Conversation
from edgevlm.runtimes.clock import ClockedSession, StageClock
from edgevlm.runtimes.detokenize import TextStream
from edgevlm.runtimes.embedding import CachedEncoder, embed_prompt
from edgevlm.runtimes.image_cache import ImageCache
from edgevlm.runtimes.loop import generate
from edgevlm.runtimes.prompt_rows import PromptRows, Row, common_prefix, prompt_rows
from edgevlm.runtimes.sampling import GREEDY, Sampling, sampler
from edgevlm.runtimes.session import Float, Session
from edgevlm.runtimes.video import Video

__all__ = ["Answer", "AnswerStream", "Chat", "RuntimeVlm", "Video"]

EMPTY = Conversation()
FULL_CHAT = "reset the chat (/reset on the command line, Chat.reset() in Python)"


@dataclass(frozen=True, eq=False, kw_only=True)
class Turn:
    """One question on its way to an answer."""

    request: Request
    conversation: Conversation  # the question included
    prompt: PromptRows
    reuse: bool  # rows that the kv cache holds already
    clock: StageClock
    cancelled: Event


class RuntimeVlm:
    """Answers questions with any ``Session``.

    It serves one request at a time: asking while a stream is unfinished raises UsageError rather than waiting
    for a stream that may be waiting for its reader.  ``info`` says what it runs on.  ``fusion``, of models with
    modality pre-fusion, says which text sees the picture before the decoder does; such a model reads exactly
    one picture or video per conversation.  ``vocab_size``: rows of the embedding, where they are known.
    """

    def __init__(
        self,
        session: Session,
        processor: Processor,
        *,
        name: str,
        max_context: int,
        image_cache_size: int = 8,
        info: Mapping[str, Any] | None = None,
        fusion: FusionShape | None = None,
        vocab_size: int | None = None,
    ) -> None:
        self.session, self.processor = session, processor
        self.fusion, self._vocab_size = fusion, vocab_size
        self.name, self.max_context, self.info = name, min(max_context, session.max_context), dict(info or {})
        self._images = ImageCache(image_cache_size)
        self._rows: Sequence[Row] = ()  # what the session's kv cache holds
        self._busy = Lock()
        self._closed = False

    def ask(
        self,
        image: ImageSource | Video | None,
        prompt: str,
        *,
        max_tokens: int = MAX_TOKENS,
        sampling: Sampling = GREEDY,
        stop: str | Sequence[str] = (),
        use_image_cache: bool = True,
        ignore_eos: bool = False,
    ) -> Answer:
        """The answer to ``prompt`` about ``image`` (a picture, a ``Video`` or nothing), from an empty kv cache.

        Ends at the model's stop token (unless ``ignore_eos``, for measurements of a fixed length), before one of
        the ``stop`` strings, or after ``max_tokens``.  Raises InputError for an empty prompt or unreadable image,
        DoesNotFitError for a prompt beyond the context, UnsupportedError for a video that this model cannot read.
        """
        stream = self.stream(
            image,
            prompt,
            max_tokens=max_tokens,
            sampling=sampling,
            stop=stop,
            use_image_cache=use_image_cache,
            ignore_eos=ignore_eos,
        )
        return stream.read()

    def stream(
        self,
        image: ImageSource | Video | None,
        prompt: str,
        *,
        max_tokens: int = MAX_TOKENS,
        sampling: Sampling = GREEDY,
        stop: str | Sequence[str] = (),
        use_image_cache: bool = True,
        ignore_eos: bool = False,
    ) -> AnswerStream:
        """Like ``ask``, piece by piece.  The input is checked here; the model starts with the first piece."""
        request = Request(
            prompt=prompt,
            max_tokens=max_tokens,
            sampling=sampling,
            stop=stop_strings(stop),
            use_image_cache=use_image_cache,
            ignore_eos=ignore_eos,
        )
        return self.begin(request, image)

    def chat(self) -> Chat:
        """An empty conversation, whose turns reuse the kv cache."""
        return Chat(self)

    @contextmanager
    def exclusive(self) -> Iterator[Session]:
        """The raw session, for code that drives it directly: nobody else may ask until the block ends.

        What the block leaves in the kv cache is forgotten.  Raises UsageError while a stream is unfinished.
        """
        self._claim()
        try:
            yield self.session
        finally:
            self._rows = ()
            self._busy.release()

    def close(self) -> None:
        """Give the session's memory back."""
        if not self._closed:
            self._closed = True
            self.session.close()

    def __enter__(self) -> RuntimeVlm:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def begin(
        self,
        request: Request,
        image: ImageSource | Video | None,
        conversation: Conversation = EMPTY,
        *,
        reuse: bool = False,
        on_end: Callable[[Conversation], None] | None = None,
    ) -> AnswerStream:
        """What ``stream`` and ``Chat.say`` share: ask the next question of ``conversation``.

        ``reuse`` keeps the rows of the kv cache that the new prompt begins with; ``on_end`` receives the
        conversation with question and answer.
        """
        clock, cancelled = StageClock(), Event()
        self._claim()
        try:
            conversation = conversation.question(request.prompt, self._load(image, clock))
            prompt = self._prompt(conversation, clock)
        except BaseException:
            self._busy.release()
            raise
        turn = Turn(
            request=request,
            conversation=conversation,
            prompt=prompt,
            reuse=reuse,
            clock=clock,
            cancelled=cancelled,
        )
        return AnswerStream(self._answer(turn, on_end), cancelled, self._busy.release)

    def _claim(self) -> None:
        if self._closed:
            raise UsageError(f"{self.name} is closed: open the bundle again")
        if not self._busy.acquire(blocking=False):
            raise UsageError(
                f"{self.name} is in the middle of another answer: read, cancel or close that stream first, "
                "or open the bundle a second time"
            )

    def _load(self, image: ImageSource | Video | None, clock: StageClock) -> Picture | None:
        if image is None:
            return None
        if isinstance(image, Video):
            return self._load_video(image, clock)
        with clock.stage("load_image"):
            loaded = load_image(image, self.processor.limits)
        with clock.stage("preprocess"):
            return self.processor.prepare(loaded)

    def _load_video(self, video: Video, clock: StageClock) -> Picture:
        """Frame by frame, so that one at a time is in memory at its full size."""
        if self.fusion is None:
            raise UnsupportedError(f"{self.name} reads pictures, not videos: ask about one frame (--image)")
        with clock.stage("preprocess"):
            return self.processor.prepare_video(video.frames)

    def _prompt(self, conversation: Conversation, clock: StageClock) -> PromptRows:
        with clock.stage("preprocess"):
            prompt = prompt_rows(self.processor, conversation.messages, conversation.pictures, self.fusion)
        self._check_vocabulary(prompt)
        if len(prompt) > self.max_context:
            advice = FULL_CHAT if len(conversation.messages) > 1 else "shorten the prompt"
            raise DoesNotFitError(
                f"the prompt has {len(prompt)} tokens ({len(prompt.positions)} of them vision tokens), "
                f"the context of {self.name} holds {self.max_context}: {advice}"
            )
        return prompt

    def _check_vocabulary(self, prompt: PromptRows) -> None:
        largest = int(prompt.ids_to_embed().max(initial=0))
        if self._vocab_size is not None and largest >= self._vocab_size:
            raise ConfigError(
                f"the prompt holds token id {largest}, but {self.name} has {self._vocab_size} embeddings: "
                "tokenizer and weights are of two models; export or copy the model again"
            )

    def _answer(self, turn: Turn, on_end: Callable[[Conversation], None] | None) -> Generator[str, None, Answer]:
        """The pieces of an answer, then the answer; notes what the kv cache holds, however it ends."""
        written = TextStream(self.processor.tokenizer.decode, turn.request.stop)
        session = ClockedSession(self.session, turn.clock)
        kept = self._rewind(turn)
        try:
            encode = CachedEncoder(session, self._images if turn.request.use_image_cache else ImageCache(0))
            embeds = embed_prompt(session, turn.prompt, encode, turn.clock, kept)
            yield from _pieces(self._tokens(session, embeds, turn), written, turn.clock)
            answer = self._finished(turn, written, kept, encode.num_encoded)
        finally:
            self._rows = (*turn.prompt.rows(), *written.token_ids)[: self.session.position]
        if on_end is not None:
            on_end(turn.conversation.answer(answer.text))
        return answer

    def _rewind(self, turn: Turn) -> int:
        """Keep the rows that the prompt begins with; how many.  The last is computed anew, for its logits."""
        kept = min(common_prefix(self._rows, turn.prompt.rows()), len(turn.prompt) - 1) if turn.reuse else 0
        self.session.rewind(kept)
        return kept

    def _limit(self, turn: Turn) -> int:
        """Tokens that may come: the last one is sampled, but takes no row."""
        return min(turn.request.max_tokens, self.max_context - len(turn.prompt) + 1)

    def _tokens(self, session: Session, embeds: Float, turn: Turn) -> Iterator[int]:
        """The generation loop, until somebody cancels."""
        sample = turn.clock.timed("sample", sampler(turn.request.sampling, turn.prompt.text_ids()))
        stop = () if turn.request.ignore_eos else self.processor.prompt_spec.stop_token_ids
        token_ids = generate(session, embeds, sample=sample, stop=stop, max_tokens=self._limit(turn))
        return takewhile(lambda _: not turn.cancelled.is_set(), token_ids)

    def _finished(self, turn: Turn, written: TextStream, kept: int, num_encoded: int) -> Answer:
        return Answer(
            text=written.text,
            token_ids=tuple(written.token_ids),
            finish_reason=self._reason(turn, written),
            num_prompt_tokens=len(turn.prompt),
            num_vision_tokens=len(turn.prompt.positions),
            num_cached_tokens=kept,
            image_from_cache=bool(turn.prompt.pictures) and num_encoded == 0,
            timings=turn.clock.timings(),
        )

    def _reason(self, turn: Turn, written: TextStream) -> FinishReason:
        if written.stopped:
            return "stop"
        if turn.cancelled.is_set():
            return "cancelled"
        return "length" if len(written.token_ids) == self._limit(turn) else "stop"


def _pieces(token_ids: Iterable[int], written: TextStream, clock: StageClock) -> Iterator[str]:
    """The text of the tokens as it can be shown; never empty pieces."""
    for token in token_ids:
        clock.token()
        with clock.stage("detokenize"):
            piece = written.push(token)
        if piece:
            clock.text()
            yield piece
        if written.stopped:
            return
    if rest := written.flush():
        clock.text()
        yield rest
