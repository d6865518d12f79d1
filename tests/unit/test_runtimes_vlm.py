"""Questions, streams and conversations, on a session that remembers what it was fed."""

from __future__ import annotations

import threading
from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Inner

from edgevlm.core.errors import ConfigError, DoesNotFitError, InputError, UnsupportedError, UsageError
from edgevlm.processing.chat import ChatTemplate
from edgevlm.processing.image_spec import ImageSpec
from edgevlm.processing.processor import Processor, PromptSpec
from edgevlm.processing.tokenizer import Tokenizer
from edgevlm.runtimes.sampling import Sampling
from edgevlm.runtimes.session import Float, ImageFeatures, Ints
from edgevlm.runtimes.vlm import RuntimeVlm

SPECIAL = ["<image>", "<|user|>", "<|assistant|>", "<|end|>"]
END = 256 + SPECIAL.index("<|end|>")
NUM_VISION_TOKENS = 4
TEMPLATE = """
{%- for message in messages %}{{ '<|' + message.role + '|>' }}
{%- if message.content is string %}{{ message.content }}{% else %}
{%- for part in message.content %}{{ '<image>' if part.type == 'image' else part.text }}{% endfor %}
{%- endif -%}
<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"""


class CountingSession:
    """Answers from a script; keeps every row it was fed, so that caches can be compared."""

    max_context = 200

    def __init__(self, answers: list[str]) -> None:
        self.answers = [[*text.encode(), END] for text in answers]
        self.rows: list[tuple[float, ...]] = []
        self.num_prefilled: list[int] = []
        self.num_encoded = 0
        self.is_closed = False
        self.before_decode: Callable[[], None] = lambda: None

    @property
    def position(self) -> int:
        return len(self.rows)

    def encode(self, pixel_values: Float) -> ImageFeatures:
        self.num_encoded += 1
        index = np.arange(NUM_VISION_TOKENS, dtype=np.float32)
        return ImageFeatures(np.tile(index[None, :, None], (1, 1, 2)) + pixel_values.mean(dtype=np.float32))

    def fuse(self, features: ImageFeatures, inputs_embeds: Float) -> Float:
        raise UnsupportedError("no pre-fusion")

    def embed(self, input_ids: Ints) -> Float:
        return np.stack([input_ids, -input_ids], axis=-1).astype(np.float32)

    def prefill(self, inputs_embeds: Float) -> Float:
        self.num_prefilled.append(inputs_embeds.shape[1])
        self.rows += [tuple(map(float, row)) for row in inputs_embeds[0]]
        return self._say()

    def decode(self, token: int) -> Float:
        self.before_decode()
        self.rows.append((float(token), float(-token)))
        return self._say()

    def rewind(self, position: int) -> None:
        assert 0 <= position <= self.position
        del self.rows[position:]
        self.script = list(self.answers[min(len(self.num_prefilled), len(self.answers) - 1)])

    def close(self) -> None:
        self.is_closed = True

    def _say(self) -> Float:
        logits = np.ones(300, np.float32)
        logits[self.script.pop(0)] = 2
        return logits


def processor() -> Processor:
    """A byte-level tokenizer without merges, a short template and 8 x 8 pictures."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Inner(models.BPE(_byte_vocab(alphabet), []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    return Processor(
        image_spec=ImageSpec(height=8, width=8, fit="stretch"),
        prompt_spec=PromptSpec(image_token="<image>", num_vision_tokens=NUM_VISION_TOKENS, stop_token_ids=(END,)),
        tokenizer=Tokenizer(inner),
        template=ChatTemplate(TEMPLATE),
    )


def _byte_vocab(alphabet: list[str]) -> dict[str, int]:
    """Byte b has id b, so that a test can write scripts as text."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [byte for byte in range(256) if byte not in printable]
    spelled = {byte: chr(byte) for byte in printable} | {byte: chr(256 + n) for n, byte in enumerate(rest)}
    assert sorted(spelled.values()) == alphabet
    return {character: byte for byte, character in spelled.items()}


def make_vlm(*answers: str, max_context: int = 200, image_cache_size: int = 8) -> RuntimeVlm:
    session = CountingSession(list(answers) or ["two"])
    return RuntimeVlm(session, processor(), name="tiny", max_context=max_context, image_cache_size=image_cache_size)


def session_of(vlm: RuntimeVlm) -> CountingSession:
    assert isinstance(vlm.session, CountingSession)
    return vlm.session


def image(level: int = 100) -> NDArray[np.uint8]:
    return np.full((8, 8, 3), level, np.uint8)


# -- one question ---------------------------------------------------------------------------------------


def test_an_answer_says_how_it_came_about() -> None:
    answer = make_vlm("two cups").ask(image(), "How many?")
    assert answer.text == "two cups"
    assert bytes(answer.token_ids) == b"two cups"
    assert answer.finish_reason == "stop"
    assert answer.num_vision_tokens == NUM_VISION_TOKENS
    assert answer.num_prompt_tokens == len("How many?") + NUM_VISION_TOKENS + 3
    assert (answer.num_cached_tokens, answer.image_from_cache) == (0, False)
    assert len(answer.timings.token_times_ms) == 8


def test_pieces_join_to_the_text_of_the_answer() -> None:
    stream = make_vlm("zwei Stühle 🙂").stream(image(), "How many?")
    pieces = list(stream)
    assert "".join(pieces) == stream.answer.text == "zwei Stühle 🙂"
    assert not any("\ufffd" in piece for piece in pieces)


def test_an_answer_needs_no_image() -> None:
    answer = make_vlm().ask(None, "Hello")
    assert (answer.text, answer.num_vision_tokens, answer.image_from_cache) == ("two", 0, False)


def test_an_empty_answer_is_an_answer() -> None:
    answer = make_vlm("").ask(None, "Hello")
    assert (answer.text, answer.finish_reason, answer.timings.tpot_ms) == ("", "stop", None)


def test_max_tokens_ends_an_answer() -> None:
    answer = make_vlm("abcdef").ask(None, "Hello", max_tokens=3)
    assert (answer.text, answer.finish_reason) == ("abc", "length")


def test_a_measurement_may_go_on_past_the_stop_token() -> None:
    answer = make_vlm("abc").ask(None, "Hello", max_tokens=4, ignore_eos=True)
    assert (len(answer.token_ids), answer.finish_reason) == (4, "length")


def test_a_stop_string_ends_an_answer_and_is_not_in_it() -> None:
    answer = make_vlm("yes. No.").ask(None, "Hello", stop=". ")
    assert (answer.text, answer.finish_reason) == ("yes", "stop")


def test_the_context_ends_an_answer() -> None:
    vlm = make_vlm("abcdefghijkl", max_context=16)
    answer = vlm.ask(None, "Hello")
    assert answer.num_prompt_tokens == 8
    assert (answer.text, answer.finish_reason) == ("abcdefghi", "length")
    assert vlm.session.position == 16


def test_a_prompt_that_just_fits_gets_one_token() -> None:
    answer = make_vlm("abc", max_context=8).ask(None, "Hello")
    assert (answer.text, answer.finish_reason) == ("a", "length")


def test_a_prompt_beyond_the_context_is_refused_before_any_work() -> None:
    vlm = make_vlm(max_context=11)
    with pytest.raises(DoesNotFitError, match=r"12 tokens \(4 of them vision tokens\), the context of tiny holds 11"):
        vlm.ask(image(), "Hello")
    assert (session_of(vlm).num_prefilled, session_of(vlm).num_encoded) == ([], 0)


@pytest.mark.parametrize("prompt", ["", " \n"])
def test_an_empty_prompt_is_refused(prompt: str) -> None:
    with pytest.raises(InputError, match="the prompt is empty"):
        make_vlm().ask(image(), prompt)


def test_max_tokens_below_one_is_refused() -> None:
    with pytest.raises(ConfigError, match="max_tokens"):
        make_vlm().ask(None, "Hello", max_tokens=0)


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(ConfigError, match="stop string is empty"):
        make_vlm().ask(None, "Hello", stop=["a", ""])


def test_a_missing_image_leaves_the_model_free_for_the_next_question() -> None:
    vlm = make_vlm()
    with pytest.raises(InputError):
        vlm.ask("nowhere.png", "Hello")
    assert vlm.ask(None, "Hello").text == "two"


def test_the_penalty_counts_the_text_of_the_prompt() -> None:
    greedy = make_vlm("t").ask(None, "t")
    punished = make_vlm("t").ask(None, "t", sampling=Sampling(repetition_penalty=1e9), max_tokens=1)
    assert (greedy.text, len(punished.token_ids)) == ("t", 1)
    assert punished.token_ids != greedy.token_ids


# -- the image cache ------------------------------------------------------------------------------------


def test_a_known_image_is_not_encoded_again_and_the_answer_says_so() -> None:
    vlm = make_vlm()
    answers = [vlm.ask(image(), "Hello"), vlm.ask(image(), "Other")]
    assert [answer.image_from_cache for answer in answers] == [False, True]
    assert session_of(vlm).num_encoded == 1


def test_another_image_is_encoded() -> None:
    vlm = make_vlm()
    assert not any(vlm.ask(image(level), "Hello").image_from_cache for level in (1, 2, 3))


def test_without_the_image_cache_every_image_is_encoded() -> None:
    vlm = make_vlm()
    answers = [vlm.ask(image(), "Hello", use_image_cache=False) for _ in range(2)]
    assert not any(answer.image_from_cache for answer in answers)
    assert session_of(vlm).num_encoded == 2


def test_a_question_starts_from_an_empty_kv_cache() -> None:
    vlm = make_vlm()
    answers = [vlm.ask(None, "Hello") for _ in range(2)]
    assert [answer.num_cached_tokens for answer in answers] == [0, 0]
    assert session_of(vlm).num_prefilled == [8, 8]


# -- streams --------------------------------------------------------------------------------------------


def test_an_unfinished_stream_has_no_answer() -> None:
    stream = make_vlm("abc").stream(None, "Hello")
    next(stream)
    with pytest.raises(UsageError, match="not complete"):
        _ = stream.answer


def test_cancel_ends_the_answer_after_at_most_one_more_token() -> None:
    stream = make_vlm("abcdef").stream(None, "Hello")
    first = next(stream)
    stream.cancel()
    answer = stream.read()
    assert first == "a"
    assert len(answer.token_ids) <= 2
    assert (answer.finish_reason, answer.text) == ("cancelled", bytes(answer.token_ids).decode())


def test_cancel_may_come_from_another_thread() -> None:
    vlm = make_vlm("abcdef")
    stream = vlm.stream(None, "Hello")

    def cancel_elsewhere() -> None:
        thread = threading.Thread(target=stream.cancel)
        thread.start()
        thread.join()

    session_of(vlm).before_decode = cancel_elsewhere
    assert stream.read().finish_reason == "cancelled"
    assert vlm.session.position == 8 + 1


@pytest.mark.parametrize("num_pieces", [0, 2])
def test_a_closed_stream_leaves_the_model_free(num_pieces: int) -> None:
    vlm = make_vlm("abcdef")
    with vlm.stream(None, "Hello") as stream:
        assert [next(stream) for _ in range(num_pieces)] == ["a", "b"][:num_pieces]
    assert list(stream) == []
    assert vlm.ask(None, "Hello").text == "abcdef"


def test_a_dropped_stream_leaves_the_model_free() -> None:
    vlm = make_vlm("abcdef")
    next(vlm.stream(None, "Hello"))
    assert vlm.ask(None, "Hello").text == "abcdef"


def test_a_second_question_during_a_stream_is_refused() -> None:
    vlm = make_vlm("abcdef")
    stream = vlm.stream(None, "Hello")
    with pytest.raises(UsageError, match="in the middle of another answer"):
        vlm.ask(None, "Hello")
    assert stream.read().text == "abcdef"


def test_a_session_that_fails_leaves_the_model_free() -> None:
    vlm = make_vlm("abc")

    def fail() -> None:
        raise RuntimeError

    session_of(vlm).before_decode = fail
    with pytest.raises(RuntimeError):
        vlm.ask(None, "Hello")
    session_of(vlm).before_decode = lambda: None
    assert vlm.ask(None, "Hello").text == "abc"


def test_a_closed_model_refuses_questions() -> None:
    with make_vlm() as vlm:
        pass
    assert session_of(vlm).is_closed
    with pytest.raises(UsageError, match="tiny is closed"):
        vlm.ask(None, "Hello")


# -- conversations --------------------------------------------------------------------------------------


def test_a_second_turn_computes_only_what_is_new() -> None:
    vlm = make_vlm("two", "red")
    chat = vlm.chat()
    first = chat.say("How many?", image()).read()
    second = chat.say("Colour?").read()
    assert second.num_cached_tokens == first.num_prompt_tokens + len("two")
    assert session_of(vlm).num_prefilled[1] == len("Colour?") + 4  # end of the answer, and three marks
    assert session_of(vlm).num_encoded == 1
    assert second.image_from_cache


def test_reuse_leaves_the_same_rows_as_computing_everything() -> None:
    reusing, computing = make_vlm("two", "red", "blue"), make_vlm("-", "two", "-", "red", "-", "blue")
    chats = [reusing.chat(), computing.chat()]
    for prompt, picture in (("How many?", image(1)), ("Colour?", None), ("And here?", image(2))):
        computing.ask(None, "something in between")
        answers = [chat.say(prompt, picture).read() for chat in chats]
        assert answers[0].text == answers[1].text
        assert session_of(reusing).rows == session_of(computing).rows
    assert sum(session_of(reusing).num_prefilled) < sum(session_of(computing).num_prefilled)


def test_another_picture_with_the_same_words_is_not_reused() -> None:
    vlm = make_vlm()
    vlm.chat().say("How many?", image(1)).read()
    other = vlm.chat().say("How many?", image(2)).read()
    assert (other.num_cached_tokens, other.image_from_cache) == (1, False)


def test_the_same_question_again_still_computes_one_row_for_its_logits() -> None:
    vlm = make_vlm()
    vlm.chat().say("How many?", image()).read()
    again = vlm.chat().say("How many?", image()).read()
    assert (again.text, again.num_cached_tokens) == ("two", again.num_prompt_tokens - 1)
    assert session_of(vlm).num_prefilled[1] == 1


def test_a_cancelled_turn_is_remembered_as_far_as_it_got() -> None:
    vlm = make_vlm("abcdef", "two")
    chat = vlm.chat()
    stream = chat.say("Hello")
    next(stream)
    stream.cancel()
    text = stream.read().text
    assert chat.messages[-1] == {"role": "assistant", "content": text}
    assert chat.say("More").read().num_cached_tokens >= 8


def test_a_closed_turn_was_never_asked() -> None:
    vlm = make_vlm("abcdef")
    chat = vlm.chat()
    with chat.say("Hello") as stream:
        next(stream)
    assert chat.messages == ()
    assert chat.say("Hello").read().text == "abcdef"


def test_reset_forgets_what_was_said() -> None:
    vlm = make_vlm()
    chat = vlm.chat()
    chat.say("Hello", image()).read()
    chat.reset()
    assert chat.say("Hello").read().num_vision_tokens == 0


def test_a_conversation_beyond_the_context_is_refused_with_advice() -> None:
    chat = make_vlm(max_context=24).chat()
    chat.say("Hello").read()
    with pytest.raises(DoesNotFitError, match=r"reset the chat \(/reset on the command line, Chat.reset\(\)"):
        chat.say("A longer question")
    assert len(chat.messages) == 2
    chat.reset()
    assert chat.say("Hello").read().text == "two"


def test_a_chat_can_be_asked_for_the_whole_answer() -> None:
    chat = make_vlm("two", "red").chat()
    assert [chat.ask("How many?", image()).text, chat.ask("Colour?", max_tokens=2).text] == ["two", "re"]
    assert len(chat.messages) == 4


# -- the session itself ---------------------------------------------------------------------------------


def test_while_a_stream_is_unfinished_nobody_gets_the_session() -> None:
    vlm = make_vlm("abc")
    stream = vlm.stream(None, "Hello")
    with pytest.raises(UsageError, match="in the middle of another answer"), vlm.exclusive():
        pass
    assert stream.read().text == "abc"


def test_whoever_has_the_session_has_it_alone() -> None:
    vlm = make_vlm()
    with vlm.exclusive() as session:
        assert session is vlm.session
        with pytest.raises(UsageError, match="in the middle of another answer"):
            vlm.ask(None, "Hello")
    assert vlm.ask(None, "Hello").text == "two"


def test_rows_from_before_somebody_else_had_the_session_are_not_reused() -> None:
    vlm = make_vlm("two", "red", "red")
    chat = vlm.chat()
    chat.ask("How many?", image())
    with vlm.exclusive() as session:
        session.rewind(0)
        session.prefill(session.embed(np.arange(40)[None]))
    assert chat.ask("Colour?").num_cached_tokens == 0
