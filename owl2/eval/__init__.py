"""Benchmarks: the tables of the paper, and datasets of the user.

Start with `evaluate.evaluate`; a benchmark is an entry in ``task_configs/`` and a metric.
"""
