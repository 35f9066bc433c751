"""`owl2 data check`. Start with `command.validate_datasets`."""
