"""The models as PyTorch modules: encoder, projector, decoder, and the checkpoints that fill them."""
