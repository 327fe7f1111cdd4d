"""Files as strangers may send them: seeded mutations of every kind of file that the engine opens, and what becomes of each.

`mutations` alters bytes, JSON, tensors and folders; `data`, `runs` and `models` hold the kinds of files, each with a tiny whole
one and what the commands do with it; `judge` says how one case ended; `workers` runs cases in processes that may die.
`python -m benchmarks.fuzz --minutes N` runs the same for longer, and `--kinds KIND --case N` one case again.
"""
