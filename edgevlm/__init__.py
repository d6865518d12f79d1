"""Vision-language models on edge devices."""
