"""The table of a detector's classes on the terminal."""

import math
from collections.abc import Sequence

from peerlearn.runs.output import show


def show_classes(
    class_names: Sequence[str],
    objects: Sequence[int],
    per_class_ap50: Sequence[float],
    *,
    title: str,
) -> None:
    """Print a row per class: its name, its objects and its average precision, nothing where it has no object.

    Args:
        class_names: names of the classes.
        objects: number of objects of each class that count.
        per_class_ap50: average precision of each class in percent, NaN for a class without objects.
        title: title of the table.
    """
    # Imported here: `--help` should not wait for it.
    from rich.table import Table
    from rich.text import Text

    # Text, as plain strings may hold rich's markup.
    table = Table(title=Text(title))
    table.add_column("class", overflow="fold", min_width=10)
    for heading in ("objects", "AP50"):
        table.add_column(heading, justify="right", no_wrap=True)
    for name, count, ap50 in zip(class_names, objects, map(float, per_class_ap50), strict=True):
        shown = "" if math.isnan(ap50) else f"{ap50:.2f}"
        table.add_row(Text(name), f"{count:,}", shown)
    show(table)
