"""Estimates of a recipe's memory, FLOPs and time (`owl2 plan`). Start with `estimate.py`."""
