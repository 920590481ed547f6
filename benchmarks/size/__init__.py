"""The paper's table with networks that are good enough to be taken seriously."""
