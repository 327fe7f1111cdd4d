"""All kinds of files, by name."""

from tests.fuzz import data, models, runs

KINDS = data.KINDS | runs.KINDS | models.KINDS
