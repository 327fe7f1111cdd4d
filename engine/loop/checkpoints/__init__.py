"""Checkpoints: complete or absent, checked before loading, and independent of how many processes wrote them."""
