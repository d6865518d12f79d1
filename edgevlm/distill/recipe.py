"""What a training run is, as a TOML file."""

from __future__ import annotations

from dataclasses import dataclass

from edgevlm.core.errors import ConfigError, UnsupportedError
from edgevlm.core.registry import unknown_name
from edgevlm.evaluation.suites import HELD_OUT_SEEDS, SUITES
from edgevlm.shapes.config import VlmConfig, check_positive

SMALLEST_VOCABULARY = 256 + 5  # every byte, and the tokens of the chat template
LONGEST_TEXT = 64  # tokens of a question with its answer


@dataclass(frozen=True, kw_only=True)
class SceneData:
    """Generated scenes: numbers ``0 … num_scenes - 1`` of ``seed``, drawn at the encoder's image size."""

    num_scenes: int
    seed: int = 1
    chained: float = 0.25  # share of pictures whose questions follow each other as one conversation
    captioned: float = 0.3  # share of pictures that are also described
    jitter: float = 0.15  # largest relative change of brightness and contrast

    def __post_init__(self) -> None:
        check_positive(self, "num_scenes")
        for name in ("chained", "captioned", "jitter"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"data.{name} must lie between 0 and 1, got {getattr(self, name)}")
        if self.seed in HELD_OUT_SEEDS:
            raise ConfigError(f"data.seed {self.seed} names scenes that scores are taken on: choose another")


@dataclass(frozen=True, kw_only=True)
class Optimization:
    """AdamW (arXiv:1711.05101), warm-up, constant rate, then linear decay to zero (arXiv:2405.18392)."""

    steps: int
    batch_images: int = 64  # over all processes
    learning_rate: float = 1.5e-3
    warmup_steps: int = 200
    decay_steps: int = 1000
    weight_decay: float = 0.05
    gradient_clip: float = 1.0
    facts_weight: float = 0.5  # of the auxiliary loss on the encoder's grid

    def __post_init__(self) -> None:
        check_positive(self, "steps", "batch_images")
        if min(self.warmup_steps, self.decay_steps) < 0 or min(self.learning_rate, self.gradient_clip) <= 0:
            raise ConfigError("steps cannot be negative; learning_rate and gradient_clip must be above 0")
        if self.warmup_steps + self.decay_steps > self.steps:
            raise ConfigError(
                f"warmup_steps ({self.warmup_steps}) and decay_steps ({self.decay_steps}) exceed steps ({self.steps})"
            )

    def rate(self, step: int) -> float:
        """Learning rate of a step counted from 0."""
        rising = (step + 1) / max(1, self.warmup_steps)
        falling = (self.steps - step) / max(1, self.decay_steps)
        return self.learning_rate * min(1.0, rising, falling)


@dataclass(frozen=True, kw_only=True)
class TrainRecipe:
    """A model, its data and how long it learns."""

    name: str
    model: VlmConfig
    data: SceneData
    optimization: Optimization
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    seed: int = 0
    log_every: int = 50
    save_every: int = 250
    suite: str = "scenes"

    def __post_init__(self) -> None:
        check_positive(self, "log_every", "save_every")
        if self.model.fusion is not None:
            raise UnsupportedError("model.fusion: training does not fuse pictures and text yet; leave it out")
        decoder, images = self.model.decoder, self.optimization.batch_images
        if images > self.data.num_scenes:
            raise ConfigError(f"batch_images ({images}) exceeds num_scenes ({self.data.num_scenes})")
        if decoder.vocab_size < SMALLEST_VOCABULARY:
            raise ConfigError(f"vocab_size must be at least {SMALLEST_VOCABULARY}, got {decoder.vocab_size}")
        if decoder.max_position_embeddings < self.model.num_vision_tokens + LONGEST_TEXT:
            raise ConfigError(
                f"max_position_embeddings ({decoder.max_position_embeddings}) must hold "
                f"{self.model.num_vision_tokens} vision tokens and {LONGEST_TEXT} of text"
            )
        if self.suite not in SUITES:
            raise ConfigError(unknown_name("suite", self.suite, list(SUITES)))
