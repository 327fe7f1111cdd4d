"""What questions share: they import from here, and never from each other."""
