"""Lists of weights' names for errors: what is missing, too much, or of another shape."""

from collections.abc import Iterable, Mapping

KEYS_SHOWN = 12
Shapes = Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]]


def key_problems(missing: Iterable[str], unexpected: Iterable[str], shapes: Shapes) -> str:
    """What does not fit, as lists for an error; empty if all fits.

    Args:
        shapes: by name, the shape in the file and the one in the model.
    """
    others = {f"{key}: {a} in the file, {b} in the model" for key, (a, b) in shapes.items()}
    kinds = {
        "missing": sorted(missing),
        "unexpected": sorted(unexpected),
        "of another shape": sorted(others),
    }
    return "\n".join(listing(f"{len(keys)} {kind}", keys) for kind, keys in kinds.items() if keys)


def listing(title: str, lines: list[str]) -> str:
    """A title and the first lines under it."""
    shown = lines[:KEYS_SHOWN]
    if len(lines) > KEYS_SHOWN:
        shown.append(f"... and {len(lines) - KEYS_SHOWN} more")
    return "\n".join([f"  {title}:", *(f"    {line}" for line in shown)])
