"""The folder that crosses from workshop to device: manifest, hashes, one-file form, golden tensors."""
