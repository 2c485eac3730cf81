"""`peerlearn data verify`: all that is wrong with detection data or a folder of images, and a summary."""

import argparse
import contextlib
import json
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peerlearn.errors import DONE, FAILURE
from peerlearn.runs.output import show
from peerlearn.runs.progress import progress
from peerlearn.runs.text import printable

if TYPE_CHECKING:
    from peerlearn.data.verify import Findings, Split

_SHOWN = 20


def add_verify(actions: "argparse._SubParsersAction[Any]") -> None:
    """Add the action to those of `peerlearn data`."""
    about = "report all that is wrong with detection data or a folder of images"
    verify = actions.add_parser(
        "verify",
        help=about,
        usage="peerlearn data verify FOLDER|JSON [--images DIR] [--classes NAME ...] [--against FOLDER|JSON ...] "
        "[--verbose] [--json]",
        description=f"{about[0].upper()}{about[1:]}:\nmissing images and annotations, images that cannot be decoded, "
        "malformed annotations,\nsizes unlike the file's, empty boxes and boxes outside the image, unknown classes, "
        "images\nlisted twice, and duplicates within and across splits, exact and near. Nothing is changed.",
        epilog="examples:\n"
        "  peerlearn data verify data/VOCdevkit\n"
        "  peerlearn data verify train.json --images photos --against test.json\n"
        "  peerlearn data verify my_photos --against data/VOCdevkit/VOC2007\n\n"
        "exit code: 0 if nothing is wrong, else 1",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verify.add_argument(
        "source",
        type=Path,
        metavar="FOLDER|JSON",
        help="VOC devkit, JSON file in COCO's format, or folder of images",
    )
    verify.add_argument(
        "--images",
        type=Path,
        metavar="DIR",
        help="folder that the names in a JSON file start from (default: looked for beside the file)",
    )
    verify.add_argument(
        "--classes",
        nargs="+",
        metavar="NAME",
        help="class names of a devkit (default: the 20 of Pascal VOC)",
    )
    verify.add_argument(
        "--against",
        nargs="+",
        type=Path,
        default=[],
        metavar="FOLDER|JSON",
        help="other data that should share no image with it, such as test images",
    )
    verify.add_argument(
        "--verbose",
        action="store_true",
        help=f"print all lines of each kind, not the first {_SHOWN} alone",
    )
    verify.add_argument("--json", action="store_true", help="print one JSON object")
    verify.set_defaults(run=_verify)


def _verify(arguments: argparse.Namespace) -> int:
    # Imported here: --help should not wait for torch.
    from peerlearn.data.verify import verify

    with _quiet() if arguments.json else contextlib.nullcontext():
        found = verify(
            arguments.source,
            images=arguments.images,
            classes=arguments.classes,
            against=arguments.against,
        )
    if arguments.json:
        print(json.dumps(_as_json(found), indent=2))
    else:
        _print(found, None if arguments.verbose else _SHOWN)
    return FAILURE if found.faults else DONE


def _quiet() -> contextlib.AbstractContextManager[object]:
    """Tell nobody how far it is."""
    return progress(0, "images", name="verifying", quiet=True)


def _counts(split: "Split") -> dict[str, Any]:
    """What is in a split."""
    data = split.annotated
    if data is None:
        return {"images": len(split.images)}
    labels = Counter(label for of_image in data.labels for label in of_image.tolist())
    return {
        "images": len(data),
        "objects": labels.total(),
        "difficult": sum(int(each.sum()) for each in data.difficult),
        "truncated": sum(int(each.sum()) for each in data.truncated),
        "without objects": sum(not len(each) for each in data.labels),
        "classes": {name: labels[label] for label, name in enumerate(data.class_names)},
    }


def _as_json(found: "Findings") -> dict[str, Any]:
    return {
        "clean": not found.faults,
        "splits": {split.name: _counts(split) for split in found.splits},
        "faults": {
            kind.value: [
                {"files": [str(file) for file in fault.files], "line": fault.line}
                for fault in faults
            ]
            for kind, faults in found.faults.items()
        },
        "remarks": found.remarks,
    }


def _print(found: "Findings", shown: int | None) -> None:
    """Print the faults and a summary; of a kind, and of the classes, the first ``shown``, or all."""
    for kind, faults in found.faults.items():
        print(f"{kind.value}: {len(faults):,}")
        for fault in faults[:shown]:
            print(f"  {printable(fault.line)}")
        if shown is not None and len(faults) > shown:
            print(f"  and {len(faults) - shown:,} more (--verbose prints them)")
        print()
    _print_counts({printable(split.name): _counts(split) for split in found.splits}, shown)
    for remark in found.remarks:
        print(printable(remark))
    total = sum(map(len, found.faults.values()))
    told = f"{total:,} fault{'s' if total > 1 else ''}" if total else "nothing wrong was found"
    print(f"\n{told}")


def _print_counts(counts: dict[str, dict[str, Any]], shown: int | None) -> None:
    """A table of the splits, and one of their objects by class."""
    classes = {name: each.pop("classes") for name, each in counts.items() if "classes" in each}
    _print_table("", counts)
    names = list(dict.fromkeys(name for each in classes.values() for name in each))
    if names:
        print()
        by_class = {
            printable(name): {split: each[name] for split, each in classes.items()}
            for name in names[:shown]
        }
        _print_table("objects", by_class)
    if shown is not None and len(names) > shown:
        print(f"and {len(names) - shown:,} more classes (--verbose prints them)")


def _print_table(corner: str, rows: dict[str, dict[str, int]]) -> None:
    """Rows of numbers by their names, with the names of the columns above."""
    from rich.table import Table
    from rich.text import Text

    if not rows:
        return
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    table = Table(box=None, header_style="")
    table.add_column(Text(corner))
    for column in columns:
        table.add_column(Text(column), justify="right", no_wrap=True)
    for name, row in rows.items():
        table.add_row(Text(name), *(f"{row.get(column, 0):,}" for column in columns))
    show(table)
