"""The commands that put a model into people's hands: serve, web."""

import typer

app = typer.Typer()
