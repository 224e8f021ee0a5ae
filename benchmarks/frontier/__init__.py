"""Accuracy against layers: DACT next to taught encoders and multi-exits; `__main__.py` runs it."""
