"""The model families, one file each behind the interface of `family.py`."""
