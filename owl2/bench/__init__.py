"""`owl2 bench`: speed and memory against a baseline implementation and transformers' LLaMA.

`cases.py` defines what is measured, `implementations.py` what is compared; start in `run.py`.
"""
