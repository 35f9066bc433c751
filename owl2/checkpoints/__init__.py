"""Files to models and back. Start with `load`, which the model class uses to load itself.

Of `owl2.model`, this package imports the configuration and the registry only.
"""
