"""Engines of TensorRT and TensorRT-RTX: what the installed version can do, how engines are built, kept and opened."""
