"""Training from a recipe: stages, LoRA, exact resume, several GPUs.

Start with `recipe.py` (all settings), then `run.py` (a run from the recipe to the model).
"""
