"""Accuracy against layers: DACT next to taught encoders and multi-exits. `__main__.py` has the
commands."""
