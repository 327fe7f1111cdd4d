"""The training loop: trainer tells the story; step, optimizer, zero, ema, metrics, validation, checkpoint are its parts."""
