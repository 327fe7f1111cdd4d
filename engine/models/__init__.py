"""The model families, one file each behind the interfaces of `encoder.py` (the frozen side) and `family.py` (the trained)."""
