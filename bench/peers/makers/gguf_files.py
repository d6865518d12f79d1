"""The text model for llama.cpp: one GGUF file of float16 weights, and what llama.cpp itself quantizes it to.

    python -m bench.peers.makers.gguf_files MODEL OUT

Runs where llama-cpp-python and gguf are installed.  A Qwen2 model keeps the order of its rows in GGUF.
"""

from __future__ import annotations

import json
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

FTYPES = {"q4_0": "LLAMA_FTYPE_MOSTLY_Q4_0", "q4_k_m": "LLAMA_FTYPE_MOSTLY_Q4_K_M", "q8_0": "LLAMA_FTYPE_MOSTLY_Q8_0"}
NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
LAYER_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def main(model: Path, out: Path) -> None:
    """float16 first, then every quantized file from it; the float16 one stays, to quantize from."""
    out.mkdir(parents=True, exist_ok=True)
    write_float16(model, out / "f16.gguf")
    for name, ftype in FTYPES.items():
        quantize(out / "f16.gguf", out / f"{name}.gguf", ftype)
        print(out / f"{name}.gguf")


def gguf_name(name: str) -> str:
    """What GGUF calls a tensor of ``Qwen2ForCausalLM``."""
    if name in NAMES:
        return NAMES[name]
    _, _, layer, rest = name.split(".", 3)
    module, kind = rest.rsplit(".", 1)
    return f"blk.{layer}.{LAYER_NAMES[module]}.{kind}"


def write_float16(model: Path, file: Path) -> None:
    """Matrices in float16, vectors in float32, as llama.cpp wants them."""
    gguf = import_module("gguf")
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    writer = gguf.GGUFWriter(str(file), "qwen2")
    _add_sizes(writer, config)
    header, start = _read_header(model / "model.safetensors")
    data = np.memmap(model / "model.safetensors", np.uint8, "r", offset=start)
    for name, about in header.items():
        first, end = about["data_offsets"]
        values = data[first:end].view(np.float16).reshape(about["shape"])
        writer.add_tensor(gguf_name(name), values.astype(np.float32) if values.ndim == 1 else np.array(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def quantize(source: Path, out: Path, ftype: str) -> None:
    """llama.cpp's own quantization with its defaults: the head in more bits than the rest."""
    llama = import_module("llama_cpp.llama_cpp")
    parameters = llama.llama_model_quantize_default_params()
    parameters.ftype = getattr(llama, ftype)
    if llama.llama_model_quantize(str(source).encode(), str(out).encode(), parameters):
        raise SystemExit(f"llama.cpp did not quantize {source} to {ftype}")


def _add_sizes(writer: Any, config: dict[str, Any]) -> None:
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("no_vocab")


def _read_header(file: Path) -> tuple[dict[str, Any], int]:
    """The tensors of a safetensors file of float16, and where their bytes begin."""
    with file.open("rb") as stored:
        size = int.from_bytes(stored.read(8), "little")
        header = json.loads(stored.read(size))
    header.pop("__metadata__", None)
    others = {about["dtype"] for about in header.values()} - {"F16"}
    if others:
        raise SystemExit(f"{file}: expected tensors of float16 alone; found {sorted(others)}")
    return header, 8 + size


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
