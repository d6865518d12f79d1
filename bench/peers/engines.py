"""What is compared: one line per engine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.peers.artifacts import BUNDLE, CHECKPOINT, TEXT_MODEL
from bench.peers.environments import OWN, python_of

SECTIONS = ("text", "whole", "encoder")


@dataclass(frozen=True, kw_only=True)
class Engine:
    """One thing that is timed: what runs it, on which file, and what of its worker is asked.

    ``model`` is relative to the folder of the comparison.  Engines with the same worker, model and arguments share a
    process; ``mode`` then tells it what to do.
    """

    name: str
    section: str
    worker: str
    model: str
    environment: str = OWN
    arguments: Mapping[str, Any] = field(default_factory=dict)
    mode: str = ""

    @property
    def process(self) -> tuple[str, str, str, tuple[tuple[str, Any], ...]]:
        """What engines that share a process have in common."""
        return (self.environment, self.worker, self.model, tuple(sorted(self.arguments.items())))

    def lacks(self, folder: Path) -> str | None:
        """What must be made before it can run; None when all is there."""
        if not python_of(self.environment, folder).exists():
            return f"no environment {self.environment}: compare.py setup"
        if self.worker != "ceilings" and not (folder / self.model).exists():
            return f"no {self.model}: compare.py weights"
        return None


def _ours(section: str, name: str, **arguments: str) -> Engine:
    return Engine(
        name=f"edgevlm {name}",
        section=section,
        worker="edgevlm_bundle",
        model=f"weights/{BUNDLE}",
        arguments=arguments,
    )


def _text(name: str, worker: str, model: str, environment: str) -> Engine:
    return Engine(name=name, section="text", worker=worker, model=f"weights/{model}", environment=environment)


def _torch(section: str, dtype: str, mode: str = "eager") -> Engine:
    short = {"float32": "fp32", "bfloat16": "bf16"}[dtype]
    return Engine(
        name=f"transformers {mode} {short}",
        section=section,
        worker="transformers_text" if section == "text" else "transformers_whole",
        model=f"weights/{TEXT_MODEL if section == 'text' else CHECKPOINT}",
        arguments={"dtype": dtype},
        mode=mode,
    )


CEILINGS = Engine(name="ceilings of the machine", section="", worker="ceilings", model="ceilings")
ENGINES: tuple[Engine, ...] = (
    _ours("text", "int4", decoder_precision="int4"),
    _ours("text", "int8-dynamic", decoder_precision="int8-dynamic"),
    _ours("text", "fp32", decoder_precision="fp32"),
    _text("onnxruntime-genai int4", "genai_graph", "genai-int4", "genai"),
    _text("onnxruntime-genai int4, Generator", "genai_generator", "genai-int4-generator", "genai"),
    _text("llama.cpp Q4_0", "llama_cpp", "gguf/q4_0.gguf", "llama"),
    _text("llama.cpp Q4_K_M", "llama_cpp", "gguf/q4_k_m.gguf", "llama"),
    _text("llama.cpp Q8_0", "llama_cpp", "gguf/q8_0.gguf", "llama"),
    _text("OpenVINO int4 g32", "openvino_text", "openvino-int4", "ovgenai"),
    _text("OpenVINO int8", "openvino_text", "openvino-int8", "ovgenai"),
    _text("OpenVINO GenAI int4 g32", "openvino_genai", "openvino-int4", "ovgenai"),
    _text("optimum-onnx fp32", "optimum_onnx", "optimum-fp32", "optimum"),
    _torch("text", "float32"),
    _torch("text", "float32", "compile"),
    _torch("text", "bfloat16"),
    _torch("text", "bfloat16", "compile"),
    _ours("whole", "int4", decoder_precision="int4"),
    _ours("whole", "int8-dynamic", decoder_precision="int8-dynamic"),
    _ours(
        "whole",
        "int8-dynamic, encoder OpenVINO int8",
        decoder_precision="int8-dynamic",
        encoder_runtime="openvino",
        encoder_precision="int8",
    ),
    _ours(
        "whole",
        "int4, encoder OpenVINO bf16",
        decoder_precision="int4",
        encoder_runtime="openvino-bf16",
        encoder_precision="fp32",
    ),
    _torch("whole", "float32"),
    _torch("whole", "bfloat16"),
    _ours("encoder", "ONNX Runtime fp32", decoder_precision="int4", encoder_precision="fp32"),
    _ours("encoder", "ONNX Runtime int8", decoder_precision="int4", encoder_precision="int8"),
    _ours("encoder", "OpenVINO fp32", decoder_precision="int4", encoder_runtime="openvino", encoder_precision="fp32"),
    _ours(
        "encoder", "OpenVINO bf16", decoder_precision="int4", encoder_runtime="openvino-bf16", encoder_precision="fp32"
    ),
    _ours("encoder", "OpenVINO int8", decoder_precision="int4", encoder_runtime="openvino", encoder_precision="int8"),
    _ours(
        "encoder",
        "OpenVINO int8, rest bf16",
        decoder_precision="int4",
        encoder_runtime="openvino-bf16",
        encoder_precision="int8",
    ),
    _torch("encoder", "float32"),
    _torch("encoder", "bfloat16"),
)
