"""What a whole model costs: parameters, operations and bytes per part, from its config alone."""

from __future__ import annotations

from dataclasses import replace

from edgevlm.shapes.config import (
    DecoderConfig,
    FusionConfig,
    MlpConfig,
    QueriesConfig,
    UnshuffleConfig,
    VlmConfig,
)
from edgevlm.shapes.cost import NOTHING, Cost, linear, norm, products, table
from edgevlm.shapes.vision_cost import vision_cost

BITS = {"fp32": 32, "fp16": 16, "int8": 8, "int4": 4}


def part_costs(config: VlmConfig, *, text_tokens: int, num_tiles: int = 1) -> dict[str, Cost]:
    """Each part's cost for one picture of ``num_tiles`` tiles and a prompt of ``text_tokens``, up to the first token.

    The head runs on the last row alone, as in our graphs; ``published_flops`` counts it otherwise.
    """
    fusion = fusion_cost(config, text_tokens) if config.fusion else NOTHING
    rows = num_tiles * config.num_vision_tokens + text_tokens
    costs = {
        "vision_encoder": vision_cost(config.vision).runs(num_tiles * config.num_views),
        "projector": projector_cost(config).runs(num_tiles),
        "fusion": fusion,
        "embed_tokens": table(config.decoder.vocab_size, config.decoder.hidden_size),
        "decoder": decoder_cost(config.decoder, rows),
        "lm_head": head_cost(config.decoder, 1),
    }
    return {name: cost for name, cost in costs.items() if name != "fusion" or config.fusion}


def published_flops(config: VlmConfig, *, text_tokens: int) -> int:
    """Operations to the first token as LLaVA-Mini's tables count them: no attention products, the head on every row.

    Source: arXiv:2501.03895, table 1, whose figures this reproduces with 43 text tokens when the encoder's unused
    last block is counted, too.
    """
    costs = part_costs(config, text_tokens=text_tokens)
    rows = config.num_vision_tokens + text_tokens
    costs["lm_head"] = head_cost(config.decoder, rows)
    if config.fusion:
        costs["fusion"] = published_fusion_cost(config, text_tokens)
    return sum(cost.linear_flops for cost in costs.values())


def num_parameters(config: VlmConfig) -> int:
    """All parameters, a tied head counted once."""
    return sum(cost.parameters for cost in part_costs(config, text_tokens=0).values())


def weight_bytes(num_parameters: int, precision: str) -> int:
    """Bytes of the weights in one of BITS; int8 and int4 without their scales."""
    return num_parameters * BITS[precision] // 8


def cache_bytes_per_token(config: DecoderConfig, precision: str = "fp32") -> int:
    """Bytes of one position in the kv cache, keys and values of all layers."""
    numbers = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    return numbers * BITS[precision] // 8


def fusion_cache_bytes(config: VlmConfig, precision: str = "fp32") -> int:
    """Bytes that pre-fusion keeps per picture; 0 without fusion."""
    if config.fusion is None:
        return 0
    layers = replace(config.decoder, num_hidden_layers=config.fusion.num_layers)
    return num_fusion_rows(config, config.fusion) * cache_bytes_per_token(layers, precision)


def num_fusion_rows(config: VlmConfig, fusion: FusionConfig) -> int:
    """Rows of one picture in the pre-fusion: every view's features and the compressed tokens (N + K)."""
    return config.num_views * config.vision.grid_size**2 + fusion.num_vision_tokens


def projector_cost(config: VlmConfig) -> Cost:
    """One tile's features to vision tokens; with fusion, all views' features and the compressed tokens."""
    projector, width = config.projector, config.decoder.hidden_size
    features, features_size = config.vision.grid_size**2, config.vision.feature_size
    if isinstance(projector, QueriesConfig):
        return queries_cost(projector, features, features_size, width)
    inputs = features_size * projector.factor**2 if isinstance(projector, UnshuffleConfig) else features_size
    end_row = table(1, width) if isinstance(projector, MlpConfig) and projector.end_row else NOTHING
    rows = num_fusion_rows(config, config.fusion) if config.fusion else features // projector.factor**2
    if projector.num_layers == 1:
        return linear(rows, inputs, width, bias=projector.bias) + end_row
    inner = projector.hidden_size or width
    first, second = linear(rows, inputs, inner, bias=projector.bias), linear(rows, inner, width, bias=projector.bias)
    return first + second + end_row


def queries_cost(config: QueriesConfig, features: int, size: int, width: int) -> Cost:
    """MQT's attention with constant weights, and its projection; parameters as the checkpoint holds them."""
    queries = config.num_queries
    stored = table(2 * config.table_size, size) + linear(0, size, size).layers(4) + norm(size).layers(3)
    values = 2 * features * size**2
    mixing = 2 * queries * features * size  # all heads together
    return stored + linear(queries, size, width, bias=False) + Cost(linear_flops=values + mixing)


def fusion_cost(config: VlmConfig, text_tokens: int) -> Cost:
    """LLaVA-Mini's compressor and pre-fusion as our graphs run them (arXiv:2501.03895, as released).

    The picture's rows do not look at the text, and of its features the last layer computes keys and values alone.
    """
    fusion, decoder = config.fusion, config.decoder
    assert fusion is not None
    picture, kept, width = num_fusion_rows(config, fusion), fusion.num_vision_tokens, decoder.num_attention_heads
    text = decoder_layer_cost(decoder, text_tokens).linear_flops * fusion.num_layers
    text_products = products(text_tokens, picture + text_tokens, width * decoder.head_dim).layers(fusion.num_layers)
    keys_and_values = linear(
        picture - kept, decoder.hidden_size, 2 * decoder.num_key_value_heads * decoder.head_dim, bias=False
    )
    last = decoder_layer_cost(decoder, kept).linear_flops + keys_and_values.linear_flops
    last_products = products(kept, picture, width * decoder.head_dim)
    before = decoder_layer_cost(decoder, picture).layers(fusion.num_layers - 1)
    weights = Cost(parameters=decoder_layer_cost(decoder, 0).parameters, linear_flops=text + last)
    return compressor_cost(config, fusion) + before + weights + text_products + last_products


def published_fusion_cost(config: VlmConfig, text_tokens: int) -> Cost:
    """The same with every layer over all rows at once."""
    fusion = config.fusion
    assert fusion is not None
    rows = num_fusion_rows(config, fusion) + text_tokens
    return compressor_cost(config, fusion) + decoder_layer_cost(config.decoder, rows).layers(fusion.num_layers)


def compressor_cost(config: VlmConfig, fusion: FusionConfig) -> Cost:
    """The query compressor, unfolded, over the features of the crops, or of the one view; pooling is not counted."""
    if fusion.compressor == "pool":
        return NOTHING
    size, tokens = config.vision.feature_size, fusion.num_vision_tokens
    keys = config.vision.grid_size**2 * fusion.resolution_ratio**2
    stored = table(tokens, size) + norm(size).layers(2)  # the positions' table is a constant
    attention = linear(tokens, size, size).layers(2) + linear(keys, size, size).layers(2)
    return stored + attention + products(tokens, keys, size)


def decoder_cost(config: DecoderConfig, rows: int) -> Cost:
    """``rows`` through every layer and the last norm, the full square of attention."""
    final = norm(config.hidden_size, bias=config.norm == "layer")
    positions = config.max_position_embeddings if config.positions == "learned" else 0
    layers = decoder_layer_cost(config, rows).layers(config.num_hidden_layers)
    return layers + final + table(positions, config.hidden_size)


def decoder_layer_cost(config: DecoderConfig, rows: int) -> Cost:
    """Attention, MLP and their norms."""
    width, hidden = config.hidden_size, config.intermediate_size
    queries = config.num_attention_heads * config.head_dim
    keys = config.num_key_value_heads * config.head_dim
    attention = linear(rows, width, queries + 2 * keys, bias=config.attention_bias)
    attention += linear(rows, queries, width, bias=config.output_bias) + products(rows, rows, queries)
    if config.qk_norm:
        attention += norm(config.head_dim, bias=False).layers(2)
    gated = config.mlp == "swiglu"
    mlp = linear(rows, width, (1 + gated) * hidden, bias=not gated) + linear(rows, hidden, width, bias=not gated)
    return attention + mlp + norm(width, bias=config.norm == "layer").layers(2)


def head_cost(config: DecoderConfig, rows: int) -> Cost:
    """Logits of ``rows``; a tied head has no parameters of its own."""
    cost = linear(rows, config.hidden_size, config.vocab_size, bias=False)
    return replace(cost, parameters=0) if config.tie_word_embeddings else cost
