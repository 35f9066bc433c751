"""Entry points for lmms-eval (images) and lm-eval (text).

Only these modules and `owl2.eval.lm_eval` import the two packages, which takes seconds and has side
effects.
"""

from pathlib import Path


def additional_tasks() -> Path:
    """The directory with tasks that lmms-eval lacks, for its ``--include_path``."""
    return Path(__file__).parent / "tasks"
