"""`ducat serve`: a local page on which to attack an image of a run."""

from ducat.serve.server import serve

__all__ = ["serve"]
