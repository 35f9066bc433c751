"""Tests make what they need. They never reach for the network: a hub look-up fails at once."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # read when transformers is imported, so set before it
