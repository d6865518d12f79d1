"""Vision encoders: pixel values (B, 3, H, W) to features (B, H·W, features)."""
