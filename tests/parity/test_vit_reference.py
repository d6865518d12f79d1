"""Our vision transformer against transformers' SigLIP, on tiny random weights."""

from __future__ import annotations

import torch
from transformers import SiglipVisionConfig, SiglipVisionModel

from edgevlm.models.vision.vit import VisionTransformer
from edgevlm.shapes.config import VitConfig

SIZES = {"image_size": 32, "patch_size": 8, "hidden_size": 48, "intermediate_size": 96}
DEPTH = {"num_hidden_layers": 2, "num_attention_heads": 4}


def our_name(name: str) -> str:
    """SigLIP's name of a weight in our words."""
    name = name.removeprefix("vision_model.").replace("embeddings.patch_embedding", "patch_embedding")
    name = name.replace("embeddings.position_embedding.weight", "position_embedding")
    return name.replace("encoder.layers", "layers").replace("mlp.", "")


@torch.no_grad()
def test_features_equal_those_of_siglip() -> None:
    torch.manual_seed(0)
    config = SiglipVisionConfig(**SIZES, **DEPTH, vision_use_head=False, attn_implementation="eager")
    reference = SiglipVisionModel(config).eval()
    for parameter in reference.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    ours = VisionTransformer(VitConfig(**SIZES, **DEPTH)).eval()
    ours.load_state_dict({our_name(k): v for k, v in reference.state_dict().items()})
    pixels = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(ours(pixels), reference(pixels).last_hidden_state, atol=2e-5, rtol=0)
