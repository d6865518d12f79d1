"""Models whose text sees the picture before the decoder does: what is fused, what is not, and what is kept."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Inner

from edgevlm.bundle.manifest import FusionShape
from edgevlm.core.errors import ConfigError, InputError, UnsupportedError
from edgevlm.processing.chat import ChatTemplate, user_message
from edgevlm.processing.image_spec import ImageSpec
from edgevlm.processing.processor import Processor, PromptSpec
from edgevlm.processing.tokenizer import Tokenizer
from edgevlm.runtimes.session import Float, ImageFeatures, Ints
from edgevlm.runtimes.video import Video
from edgevlm.runtimes.vlm import RuntimeVlm

SPECIAL = ["<|user|>", "<|assistant|>", "<|end|>", "<image>"]
USER, ASSISTANT, END, IMAGE = range(256, 260)
EMBEDDED = IMAGE  # ids below have an embedding: the placeholder, like FastVLM's, has none
K = 2
TEMPLATE = """
{%- for message in messages %}{{ '<|' + message.role + '|>' }}
{%- if message.content is string %}{{ message.content }}{% else %}
{%- for part in message.content %}{{ '<image>' if part.type == 'image' else part.text }}{% endfor %}
{%- endif -%}
<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"""


class FusingSession:
    """Fuses text by a running sum that begins with the picture's brightness; keeps every row it was fed."""

    max_context = 200

    def __init__(self, answers: list[list[int]]) -> None:
        self.answers = answers
        self.rows: list[tuple[float, ...]] = []
        self.num_prefilled: list[int] = []
        self.encoded: list[float] = []
        self.fused: list[list[float]] = []

    @property
    def position(self) -> int:
        return len(self.rows)

    def encode(self, pixel_values: Float) -> ImageFeatures:
        level = float(pixel_values.mean())
        self.encoded.append(round(level, 3))
        tokens = np.stack([np.arange(K), np.full(K, level)], axis=-1)[None].astype(np.float32)
        return ImageFeatures(tokens, np.full((1, 2, 1, 1, 1), level, np.float32))

    def fuse(self, features: ImageFeatures, inputs_embeds: Float) -> Float:
        assert features.fusion_cache is not None
        self.fused.append(inputs_embeds[0, :, 0].tolist())
        fused: Float = np.cumsum(inputs_embeds, axis=1) + features.fusion_cache.mean()
        return fused

    def embed(self, input_ids: Ints) -> Float:
        assert input_ids.max() < EMBEDDED
        return np.stack([input_ids, -input_ids], axis=-1).astype(np.float32)

    def prefill(self, inputs_embeds: Float) -> Float:
        self.num_prefilled.append(inputs_embeds.shape[1])
        self.rows += [tuple(map(float, row)) for row in inputs_embeds[0]]
        return self._say()

    def decode(self, token: int) -> Float:
        self.rows.append((float(token), float(-token)))
        return self._say()

    def rewind(self, position: int) -> None:
        assert 0 <= position <= self.position
        del self.rows[position:]
        self.script = [*self.answers[min(len(self.num_prefilled), len(self.answers) - 1)], END]

    def close(self) -> None:
        pass

    def _say(self) -> Float:
        logits = np.ones(300, np.float32)
        logits[self.script.pop(0)] = 2
        return logits


def processor() -> Processor:
    """A byte-level tokenizer, in which "!" has id 0 as in Llama 3, and 8 x 8 pictures."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Inner(models.BPE({character: id for id, character in enumerate(alphabet)}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    return Processor(
        image_spec=ImageSpec(height=8, width=8, fit="stretch"),
        prompt_spec=PromptSpec(image_token="<image>", num_vision_tokens=K, stop_token_ids=(END,)),
        tokenizer=Tokenizer(inner),
        template=ChatTemplate(TEMPLATE),
    )


PROCESSOR = processor()


def ids_of(text: str) -> list[int]:
    return PROCESSOR.tokenizer.encode(text)


def make_vlm(*answers: str, skip_token_zero: bool = True, image_cache_size: int = 8) -> RuntimeVlm:
    return RuntimeVlm(
        FusingSession([ids_of(text) for text in answers or ("two",)]),
        PROCESSOR,
        name="tiny",
        max_context=200,
        image_cache_size=image_cache_size,
        fusion=FusionShape(num_layers=1, skip_token_zero=skip_token_zero),
        vocab_size=EMBEDDED,
    )


def session_of(vlm: RuntimeVlm) -> FusingSession:
    assert isinstance(vlm.session, FusingSession)
    return vlm.session


def image(level: int = 51) -> NDArray[np.uint8]:
    """Of brightness ``level`` / 255 once it is pixels."""
    return np.full((8, 8, 3), level, np.uint8)


def first_column(vlm: RuntimeVlm) -> list[float]:
    return [round(row[0], 4) for row in session_of(vlm).rows]


# -- one question ---------------------------------------------------------------------------------------


def test_all_text_is_fused_in_order_and_put_back_around_the_vision_tokens() -> None:
    vlm = make_vlm()
    vlm.ask(image(), "ab", max_tokens=1)
    a, b = ids_of("ab")
    assert session_of(vlm).fused == [[USER, a, b, END, ASSISTANT]]
    sums = np.cumsum([USER, a, b, END, ASSISTANT]) + 0.2
    assert first_column(vlm) == pytest.approx([sums[0], 0, 1, *sums[1:]])


def test_without_a_picture_nothing_is_fused() -> None:
    vlm = make_vlm()
    vlm.ask(None, "ab", max_tokens=1)
    assert session_of(vlm).fused == []
    assert first_column(vlm) == [USER, *ids_of("ab"), END, ASSISTANT]


@pytest.mark.parametrize("skip", [True, False])
def test_token_zero_is_left_out_only_where_the_model_was_trained_so(skip: bool) -> None:
    vlm = make_vlm(skip_token_zero=skip)
    vlm.ask(image(), "a!b", max_tokens=1)
    a, zero, b = ids_of("a!b")
    assert zero == 0
    assert session_of(vlm).fused == [[USER, a, *([] if skip else [0]), b, END, ASSISTANT]]
    assert (first_column(vlm)[4] == 0) == skip  # left out, it keeps its own embedding
    assert first_column(vlm)[5] == pytest.approx(USER + a + b + 0.2)


def test_a_second_question_about_a_picture_does_not_run_the_encoder_again() -> None:
    vlm = make_vlm()
    answers = [vlm.ask(image(), prompt) for prompt in ("ab", "cd", "ef")]
    assert len(session_of(vlm).encoded) == 1
    assert len(session_of(vlm).fused) == 3
    assert [answer.image_from_cache for answer in answers] == [False, True, True]


def test_without_the_image_cache_the_encoder_runs_every_time() -> None:
    vlm = make_vlm()
    for _ in range(2):
        vlm.ask(image(), "ab", use_image_cache=False)
    assert len(session_of(vlm).encoded) == 2


def test_the_time_of_fusion_is_told_and_counts_as_the_engines() -> None:
    timings = make_vlm().ask(image(), "ab").timings
    assert timings.stages_ms["fuse"] > 0
    assert timings.ttft_engine_ms >= sum(timings.stages_ms[name] for name in ("vision", "embed", "fuse", "prefill"))


def test_text_that_has_no_embedding_is_refused_before_any_work() -> None:
    vlm = make_vlm()
    vlm._vocab_size = 100
    with pytest.raises(ConfigError, match="token id 258, but tiny has 100 embeddings"):
        vlm.ask(image(), "ab")
    assert session_of(vlm).encoded == []


# -- conversations --------------------------------------------------------------------------------------


def test_reuse_leaves_the_same_rows_as_computing_everything() -> None:
    reusing, computing = make_vlm("two", "red", "blue"), make_vlm("-", "two", "-", "red", "-", "blue")
    chats = [reusing.chat(), computing.chat()]
    for prompt, picture in (("How many?", image()), ("Colour!", None), ("And here?", None)):
        computing.ask(None, "something in between")
        answers = [chat.ask(prompt, picture) for chat in chats]
        assert answers[0].text == answers[1].text
        assert session_of(reusing).rows == session_of(computing).rows
    assert sum(session_of(reusing).num_prefilled) < sum(session_of(computing).num_prefilled)
    assert len(session_of(reusing).encoded) == 1


def test_a_second_turn_computes_only_what_is_new() -> None:
    vlm = make_vlm("two", "red")
    chat = vlm.chat()
    first, second = chat.ask("How many?", image()), chat.ask("Colour?")
    assert second.num_cached_tokens == first.num_prompt_tokens + len("two")
    assert session_of(vlm).num_prefilled[1] == len("Colour?") + 4


def test_earlier_answers_are_not_fused() -> None:
    vlm = make_vlm("xy", "z")
    chat = vlm.chat()
    chat.ask("ab", image())
    chat.ask("cd")
    fused = session_of(vlm).fused[1]
    assert not set(ids_of("xy")) & set(fused)
    assert fused == [USER, *ids_of("ab"), END, ASSISTANT, USER, *ids_of("cd"), END, ASSISTANT]
    answer = first_column(vlm)[1 + K + 4 :][:3]
    assert answer == [*ids_of("xy"), END]


def test_text_before_a_picture_is_not_reused_from_a_conversation_without_it() -> None:
    vlm = make_vlm("two", "red")
    chat = vlm.chat()
    chat.ask("Hello")
    assert chat.ask("Colour?", image()).num_cached_tokens == 0


def test_the_same_words_about_another_picture_share_no_row() -> None:
    vlm = make_vlm()
    vlm.chat().ask("How many?", image(51))
    assert vlm.chat().ask("How many?", image(102)).num_cached_tokens == 0


def test_a_second_picture_in_a_conversation_is_refused_with_advice() -> None:
    vlm = make_vlm("two", "red")
    chat = vlm.chat()
    chat.ask("How many?", image(51))
    with pytest.raises(InputError, match=r"2 pictures in one conversation.*reset the chat"):
        chat.ask("And here?", image(102))
    assert chat.ask("Colour?").text == "red"


# -- videos ---------------------------------------------------------------------------------------------


def video(*levels: int) -> Video:
    return Video(frames=[image(level) for level in levels])


def test_a_video_is_its_frames_tokens_in_order_and_the_mean_of_the_text() -> None:
    vlm = make_vlm()
    answer = vlm.ask(video(51, 153, 0), "ab", max_tokens=1)
    a, b = ids_of("ab")
    text = np.cumsum([USER, a, b, END, ASSISTANT]) + (0.2 + 0.6 + 0.0) / 3
    assert first_column(vlm) == pytest.approx([text[0], 0, 1, 0, 1, 0, 1, *text[1:]], abs=1e-3)
    assert [round(row[1], 3) for row in session_of(vlm).rows[1:7]] == [0.2, 0.2, 0.6, 0.6, 0.0, 0.0]
    assert (answer.num_vision_tokens, session_of(vlm).encoded) == (3 * K, [0.2, 0.6, 0.0])


def test_a_video_of_one_frame_is_that_picture() -> None:
    one, other = make_vlm(), make_vlm()
    one.ask(image(), "ab")
    other.ask(video(51), "ab")
    assert session_of(one).rows == session_of(other).rows


def test_a_second_question_about_a_short_video_does_not_run_the_encoder_again() -> None:
    vlm = make_vlm()
    chat = vlm.chat()
    chat.ask("How many?", video(51, 102))
    second = chat.ask("Colour?")
    assert (len(session_of(vlm).encoded), second.image_from_cache) == (2, True)
    assert second.num_cached_tokens > 2 * K


def test_a_video_longer_than_the_image_cache_is_encoded_frame_by_frame() -> None:
    vlm = make_vlm(image_cache_size=1)
    vlm.ask(video(10, 20, 30, 40), "ab", max_tokens=1)
    assert len(session_of(vlm).encoded) == len(session_of(vlm).fused) == 4


def test_a_model_that_does_not_fuse_refuses_videos() -> None:
    vlm = RuntimeVlm(FusingSession([[65]]), PROCESSOR, name="plain", max_context=200)
    with pytest.raises(UnsupportedError, match="plain reads pictures, not videos"):
        vlm.ask(video(1, 2), "ab")
    assert vlm.ask(image(), "ab").num_vision_tokens == K


def test_a_video_without_frames_is_refused() -> None:
    with pytest.raises(InputError, match="no frames"):
        Video(frames=[])


def test_the_template_names_a_video_once() -> None:
    ids = PROCESSOR.input_ids([user_message("ab", num_images=1)], grids=[(3, 1)])
    assert (ids == IMAGE).sum() == 3 * K
