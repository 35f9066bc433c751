"""The modules of `recipes/study`, which import each other as scripts of one directory."""

import sys
from pathlib import Path

RECIPES = Path(__file__).parents[2] / "recipes" / "study"
sys.path.append(str(RECIPES))
