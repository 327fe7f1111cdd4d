"""Questions about single operations: how fast, against what, and what they compile to."""
