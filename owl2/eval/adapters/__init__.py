"""The two suites that the field uses, beside ours: lmms-eval (images) and lm-eval (text).

Their packages are imported by the modules here and by lm-eval's front door (`owl2.eval.lm_eval`),
and by nothing else of `owl2`: importing them takes seconds, and has side effects.
"""

from pathlib import Path


def own_tasks() -> Path:
    """The folder with the tasks that lmms-eval does not have, for its ``--include_path``."""
    return Path(__file__).parent / "tasks"
