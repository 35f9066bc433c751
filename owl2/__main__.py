"""`python -m owl2` is the command `owl2`."""

from owl2.cli import main

main()
