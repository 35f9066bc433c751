"""Files → Samples → batches for the model."""
