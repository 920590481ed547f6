"""The question of refusing: `python -m benchmarks.rejection --help`."""
