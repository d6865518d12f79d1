"""What a training run is, as a TOML file."""

from __future__ import annotations

from dataclasses import dataclass, field

from edgevlm.core.errors import ConfigError
from edgevlm.shapes.config import VlmConfig, check_positive


@dataclass(frozen=True, kw_only=True)
class SceneData:
    """Generated scenes: numbers ``0 … num_scenes - 1`` of ``seed``, drawn at the encoder's image size."""

    num_scenes: int
    seed: int = 1
    chained: float = 0.25  # share of pictures whose questions follow each other as one conversation
    captioned: float = 0.3  # share of pictures that are also described
    jitter: float = 0.15  # largest relative change of brightness and contrast


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
    suite: str = field(default="scenes")
