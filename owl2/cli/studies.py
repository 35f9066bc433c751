"""The commands that look inside or go over many pictures: attend, caption."""

import typer

app = typer.Typer()
