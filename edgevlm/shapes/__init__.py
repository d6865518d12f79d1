"""Model configurations and what follows from them.  No weights, no PyTorch."""
