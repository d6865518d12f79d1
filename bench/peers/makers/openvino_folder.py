"""The text model for OpenVINO, its weights compressed by optimum-intel, with the tokenizer that openvino-genai reads.

    python -m bench.peers.makers.openvino_folder MODEL OUT BITS [GROUP_SIZE]

BITS 8 is one scale per row, the library's own default.  BITS 4 has a scale per GROUP_SIZE inputs (the library's own
default is 128), every matrix of the layers in 4 bits, embedding and head in 8.
Runs where optimum-intel and openvino-genai are installed.
"""

from __future__ import annotations

import sys
from importlib import import_module

from bench.peers.torchvision_operators import define_missing_operators


def main(model: str, out: str, bits: str, group_size: str = "-1") -> None:
    """Trace, compress and save."""
    define_missing_operators()
    intel = import_module("optimum.intel")
    scheme: dict[str, object] = {"bits": int(bits), "sym": True}
    if int(bits) == 4:
        scheme |= {"group_size": int(group_size), "ratio": 1.0}
    config = intel.OVWeightQuantizationConfig(**scheme)
    loaded = intel.OVModelForCausalLM.from_pretrained(model, export=True, compile=False, quantization_config=config)
    loaded.save_pretrained(out)
    _save_tokenizer(model, out)
    print(out)


def _save_tokenizer(model: str, out: str) -> None:
    openvino = import_module("openvino")
    tokenizer = import_module("transformers").AutoTokenizer.from_pretrained(model)
    converted = import_module("openvino_tokenizers").convert_tokenizer(tokenizer, with_detokenizer=True)
    for graph, name in zip(converted, ("tokenizer", "detokenizer"), strict=True):
        openvino.save_model(graph, f"{out}/openvino_{name}.xml")


if __name__ == "__main__":
    main(*sys.argv[1:])
