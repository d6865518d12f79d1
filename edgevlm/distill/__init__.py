"""Training: data, losses, and one loop that can be stopped and resumed anywhere."""
