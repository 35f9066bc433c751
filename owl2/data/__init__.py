"""Files to samples to batches.

Start with `open_dataset.open_dataset` (files), `row_parsers.parse_row` (rows) and
`mixture.MixtureDataset` (batches); public datasets are in `datasets/`, `owl2 data check` in
`validate/`. `image_records.ImageRecords` is for commands that write a record for each image of a
folder.
"""
