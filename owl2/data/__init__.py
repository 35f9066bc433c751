"""Files to samples to batches.

Start with `open_dataset.open_dataset` (files), `row_parsers.parse_row` (rows) and
`mixture.MixtureDataset` (batches); public datasets are in `datasets/`, `owl2 data check` in
`validate/`.
"""
