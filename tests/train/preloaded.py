"""The imports of the fork server of `tests.train.processes`."""

import torch

import owl2.cli
import owl2.train.recipe_file
import owl2.train.run

torch.set_num_threads(1)
__all__ = ["owl2"]
