"""The training loop: trainer tells the story; the files and folders beside it are its parts."""

import engine.quiet  # noqa: F401  (before the libraries that it quiets)
