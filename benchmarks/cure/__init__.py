"""The search for dummy classes that hold: `python -m benchmarks.cure --help`."""
