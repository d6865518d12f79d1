"""What runs each half of a model: the encoder (with its fusion) and the decoder (with its embedding)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from edgevlm.bundle.manifest import Manifest, PartFile
from edgevlm.core.errors import ConfigError, UnsupportedError
from edgevlm.core.registry import unknown_name

DEFAULT_RUNTIME = "onnxruntime"
RUNTIME_OF: Mapping[str, str] = MappingProxyType(  # what runs parts of a target unasked; the first that a bundle holds
    {"onnx": DEFAULT_RUNTIME, "tensorrt": "tensorrt"}
)
READERS: Mapping[str, str] = MappingProxyType(  # what to say where another runtime was asked for
    {"onnx": "--runtime onnxruntime", "tensorrt": "--runtime tensorrt, or tensorrt-on-cpu to check it here"}
)
CHECKERS: Mapping[str, str] = MappingProxyType(  # runtimes that prove what another one will run, too slow to answer
    {"tensorrt": "tensorrt-on-cpu"}
)
GOALS = ("ttft", "throughput", "memory")
MOST_THREADS = 256  # each has a stack, and starts before the first question


def check_threads(threads: int | None) -> None:
    """Raises ConfigError for a number that no back end should start."""
    if threads is not None and not 1 <= threads <= MOST_THREADS:
        raise ConfigError(f"threads must be 1 to {MOST_THREADS}, got {threads}")


@dataclass(frozen=True, kw_only=True)
class PartChoice:
    """Back end, device, precision and threads of one half.

    ``device`` None: the back end's own default, the CPU.  ``precision`` None: the bundle's default for the part.
    ``threads`` None: the physical cores that this process may use.
    """

    runtime: str = DEFAULT_RUNTIME
    device: str | None = None
    precision: str | None = None
    threads: int | None = None

    def __post_init__(self) -> None:
        check_threads(self.threads)


@dataclass(frozen=True, kw_only=True)
class Choices:
    """What runs the encoder, and what the decoder."""

    encoder: PartChoice = field(default_factory=PartChoice)
    decoder: PartChoice = field(default_factory=PartChoice)


@dataclass(frozen=True, kw_only=True)
class Wishes:
    """What a caller said of it; None where nothing was said, and then a tuned choice or the default counts.

    ``runtime`` and ``device`` are for both halves, unless one has its own.  ``optimize``: the goal whose tuned choice
    is taken, one of ``GOALS``.  ``image_size``: pixels a side, one of those that the bundle was exported for.
    ``huge_pages``: lay what was loaded into huge pages.
    """

    runtime: str | None = None
    encoder_runtime: str | None = None
    decoder_runtime: str | None = None
    device: str | None = None
    encoder_precision: str | None = None
    decoder_precision: str | None = None
    threads: int | None = None
    optimize: str | None = None
    image_size: int | None = None
    huge_pages: bool | None = None

    def __post_init__(self) -> None:
        if self.optimize is not None and self.optimize not in GOALS:
            raise ConfigError(unknown_name("goal", self.optimize, GOALS))
        check_threads(self.threads)

    def over(self, choices: Choices, usual: Choices | None = None) -> Choices:
        """``choices``, with what was wished in place of what they say.

        ``usual``: what counts where a wish leaves nothing of them, ``usual_choices`` of the bundle.
        """
        usual = usual or Choices()
        return Choices(
            encoder=self._over(choices.encoder, usual.encoder, self.encoder_runtime, self.encoder_precision),
            decoder=self._over(choices.decoder, usual.decoder, self.decoder_runtime, self.decoder_precision),
        )

    def _over(self, choice: PartChoice, usual: PartChoice, runtime: str | None, precision: str | None) -> PartChoice:
        runtime, device = runtime or self.runtime, self.device
        elsewhere = device is not None and device.lower() != (choice.device or "cpu").lower()
        if elsewhere or (runtime or choice.runtime) != choice.runtime:
            choice = usual  # what was best elsewhere says nothing about another back end or device
        return PartChoice(
            runtime=runtime or choice.runtime,
            device=device or choice.device,
            precision=precision or choice.precision,
            threads=choice.threads if self.threads is None else self.threads,
        )


def usual_choices(manifest: Manifest) -> Choices:
    """What runs each half where nothing was wished or tuned: the default of the first target that holds it."""
    halves = (_usual_runtime(manifest, part) for part in ("vision_encoder", "decoder_model_merged"))
    encoder, decoder = (PartChoice(runtime=runtime) for runtime in halves)
    return Choices(encoder=encoder, decoder=decoder)


def target_of(back_end: object) -> str:
    """The target whose parts ``back_end`` reads, a class of ``RUNTIMES``; one that does not say reads ONNX bundles."""
    return str(getattr(back_end, "target", "onnx"))


def part_for(manifest: Manifest, part: str, *, target: str, precision: str | None, runtime: str) -> PartFile:
    """The part that ``runtime`` reads, of its ``target``.

    Raises UnsupportedError for a bundle that holds no such part, with the runtimes that it can be asked for, or lacks
    the ``precision``.
    """
    held = dict.fromkeys(one.target for one in manifest.parts if one.part == part)
    if held and target not in held:
        advice = "; ".join(READERS.get(name, f"a runtime for {name}") for name in held)
        raise UnsupportedError(
            f"{manifest.name}: {part} was exported for {' and '.join(held)} only, the runtime {runtime} reads "
            f"{target}: {advice}"
        )
    return manifest.part(part, target=target, precision=precision)


def _usual_runtime(manifest: Manifest, part: str) -> str:
    held = {one.target for one in manifest.parts if one.part == part}
    return next((runtime for target, runtime in RUNTIME_OF.items() if target in held), DEFAULT_RUNTIME)
