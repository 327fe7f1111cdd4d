"""The model families, one file each behind the interfaces of `encoder.py` (the frozen side) and `family.py` (the trained)."""

import engine.quiet  # noqa: F401  (before the libraries that it quiets)
