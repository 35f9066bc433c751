"""The model: tensors only. Start with `modeling`; `registry` lists the parts of a model type.

Files are read and written by `owl2.checkpoints`, which the model class calls to load itself.
"""
