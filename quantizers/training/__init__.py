"""Training for methods that need it: one small trainer, and weights that are quantized in every forward pass and learn through it."""
