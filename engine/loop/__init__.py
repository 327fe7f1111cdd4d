"""The training loop: trainer tells the story; the files and folders beside it are its parts."""
