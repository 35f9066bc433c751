"""The model card of the small model, and its size limit."""

import json
import sys

import pytest
from conftest import RECIPES  # the directory of this file is not a package

from owl2.errors import ErrorCode
from tests.errors import raises_input_error
