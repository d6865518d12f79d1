"""A decoder's weights in few bits: which of its matrices are rounded, and all of them rounded."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType

from torch import Tensor, nn

from edgevlm.core.errors import ConfigError
from edgevlm.models.decoder import DecoderLayer
from edgevlm.models.vlm import Vlm
from edgevlm.quant.floats import global_scale
from edgevlm.quant.rounding import QuantizedWeight, round_weight
from edgevlm.quant.schemes import Float4, Scheme, Static, canonical, scheme_of
from edgevlm.shapes.config import DecoderConfig

HEAD = "lm_head"

Report = Callable[[int, int], None]  # told (weights done, weights in all) after each matrix


@dataclass(frozen=True, kw_only=True, eq=False)
class QuantizedDecoder:
    """The rounded matrices by their module's path below the ``Vlm``; what is not in ``weights`` stays float.

    ``"lm_head"`` is there also when the head is tied to the embedding, which is not rounded.  ``input_scales``: of the
    activations that come into each matrix, where the scheme is ``Static``.
    """

    precision: str  # canonical
    scheme: Scheme
    weights: Mapping[str, QuantizedWeight]
    input_scales: Mapping[str, float] = field(default_factory=lambda: MappingProxyType({}))

    @property
    def num_bytes(self) -> int:
        """What the rounded matrices take."""
        return sum(weight.num_bytes for weight in self.weights.values())


def quantize_decoder(
    model: Vlm,
    precision: str,
    *,
    target: str = "onnx",
    importance: Mapping[str, Tensor] | None = None,
    input_scales: Mapping[str, float] | None = None,
    report: Report = lambda done, total: None,
) -> QuantizedDecoder:
    """Round every matrix of ``linear_layers`` and the head as ``precision`` says for ``target``.

    ``importance`` gives each matrix's inputs their weights (``edgevlm.quant.calibration``); what it lacks is rounded
    without.  A ``Static`` scheme rounds the matrices that ``input_scales`` names, which calibrating the graph gave.
    Raises ConfigError for a precision that is unknown or rounds nothing, for weights that are not finite, and for a
    ``Static`` scheme without scales.
    """
    scheme = scheme_of(precision, target)
    if scheme is None:
        raise ConfigError(f"precision {precision} rounds nothing; ask for int4, int8 or int8-dynamic")
    matrices = dict(quantized_matrices(model))
    if isinstance(scheme, Static):
        if not input_scales:
            raise ConfigError(f"precision {precision} needs the scales of activations: calibrate the graph first")
        matrices = {path: _matrix(model, path) for path in input_scales}
    if isinstance(scheme, Float4):
        largest = max(float(weight.detach().abs().max()) for weight in matrices.values())
        scheme = replace(scheme, global_scale=global_scale(largest))
    total, done = sum(weight.numel() for weight in matrices.values()), 0
    weights: dict[str, QuantizedWeight] = {}
    for path, weight in matrices.items():
        weights[path] = _rounded(path, weight, scheme, (importance or {}).get(path))
        done += weight.numel()
        report(done, total)
    return QuantizedDecoder(
        precision=canonical(precision), scheme=scheme, weights=weights, input_scales=input_scales or {}
    )


def quantized_matrices(model: Vlm) -> Iterator[tuple[str, Tensor]]:
    """Path and weight [N, K] of every matrix that is rounded, the head last."""
    for path, layer in linear_layers(model):
        yield path, layer.weight
    yield HEAD, model.head_weight


def linear_layers(model: Vlm) -> Iterator[tuple[str, nn.Linear]]:
    """Path and module of the decoder's linear layers that are rounded, the head not among them."""
    attention = heads_fit_graph(model.config.decoder)
    for number, layer in enumerate(model.decoder.layers):
        assert isinstance(layer, DecoderLayer)
        for part, module in (("self_attn", layer.self_attn), ("mlp", layer.mlp)):
            for name, child in module.named_children():
                if isinstance(child, nn.Linear) and (attention or part == "mlp"):
                    yield f"decoder.layers.{number}.{part}.{name}", child


def heads_fit_graph(config: DecoderConfig) -> bool:
    """Whether the exported graph takes the heads as they are.

    ``GroupQueryAttention`` wants a width that 16 divides where it turns heads, else 8; other heads are padded in the
    graph, which moves weights between groups, so such a model's attention keeps float weights.
    """
    return config.head_dim % (16 if config.positions == "rotary" else 8) == 0


def _matrix(model: Vlm, path: str) -> Tensor:
    if path == HEAD:
        return model.head_weight
    layer = model.get_submodule(path)
    assert isinstance(layer, nn.Linear), path
    return layer.weight


def _rounded(path: str, weight: Tensor, scheme: Scheme, importance: Tensor | None) -> QuantizedWeight:
    try:
        return round_weight(weight, scheme, head=path == HEAD, importance=importance)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
