"""Runs side by side: tables, plots and one self-contained page."""
