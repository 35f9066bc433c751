"""Captions for folders of images. Start with `command.caption`."""
