"""The former name of the command: `python -m engine.cache` is `python -m engine.shards`."""

import sys

from engine.errors import exit_code
from engine.shards import main

if __name__ == "__main__":
    sys.exit(exit_code("engine.cache", main))
