"""Fewer bits: how weights are rounded, with what calibration, and the same rounding in PyTorch as the reference."""
