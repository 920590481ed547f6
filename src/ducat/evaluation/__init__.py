"""Measuring robustness truthfully."""
