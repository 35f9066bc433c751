"""Inference: many requests to tokens and text.

Start with `engine.py` (the public class), then `engine_core.py` (the thread that runs the model),
`scheduler.py`, `running_batch.py` and `model_runner.py`.
"""
