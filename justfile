# The commands needed most; `just --list` shows them.

# The fast tests, under a minute on 2 cores
fast:
    .venv/bin/pytest -n auto -m "not slow"

# All tests
test:
    .venv/bin/pytest -n auto --cov

# The documentation, with warnings as errors
docs:
    .venv/bin/mkdocs build --strict

# Linter, format and types
lint:
    .venv/bin/ruff check
    .venv/bin/ruff format --check
    .venv/bin/mypy
