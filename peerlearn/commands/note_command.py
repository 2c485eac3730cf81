"""`peerlearn note`: what people note of a run."""

import argparse
import re
from collections.abc import Sequence
from pathlib import Path

from peerlearn.config import ArgumentParser
from peerlearn.errors import DONE, UsageError, UserError
from peerlearn.runs.directory import RunDirectory
from peerlearn.runs.notes import Notes, add_note, read_notes
from peerlearn.runs.text import listed, printable

_TAG = re.compile(r"[^\s,#]+")


def main(argv: Sequence[str]) -> int:
    """`peerlearn note RUN [TEXT] [--tag NAME ...] [--remove]`. Returns the exit code."""
    arguments = _parse(argv)
    run = RunDirectory(arguments.run)
    run.check_exists()
    text, tags = arguments.text, tuple(arguments.tag)
    try:
        before = read_notes(run.notes)
        if arguments.remove:
            _require_present(run, before, text, tags)
        if text is not None or tags:
            add_note(run.notes, text, tags, removed=arguments.remove)
        now = read_notes(run.notes)
    except OSError as error:
        raise UserError(
            f"{run.notes}: cannot be read and written ({error.strerror}): notes lie in the run directory"
        ) from error
    for line in (*(f"#{tag}" for tag in now.tags), *now.texts):
        print(printable(line))
    return DONE


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = ArgumentParser(
        prog="peerlearn note",
        description="Note something of a run, which `peerlearn runs` shows; without TEXT and --tag print its notes. "
        'Example: peerlearn note runs/demo "without the queue" --tag ablation',
        epilog="The notes lie in notes.jsonl of the run. Lines are only added to it.",
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="run directory")
    parser.add_argument("text", nargs="?", metavar="TEXT", help="note, any text")
    parser.add_argument(
        "--tag",
        action="append",
        default=[],
        metavar="NAME",
        help="word by which runs are found again: peerlearn runs --where tag=NAME; may stand several times",
    )
    parser.add_argument(
        "--remove", action="store_true", help="take the note, or the tags, away instead"
    )
    arguments = parser.parse_args(argv)
    for tag in arguments.tag:
        if not (_TAG.fullmatch(tag) and tag.isprintable()):
            raise UsageError(f"--tag: expected a word without spaces, commas and #, got {tag!r}")
    if arguments.text is not None and not arguments.text.strip():
        raise UsageError("TEXT is empty: write a note, or leave it away")
    if arguments.remove and arguments.text is None and not arguments.tag:
        raise UsageError("--remove: name the note, or --tag NAME, that is to go")
    return arguments


def _require_present(
    run: RunDirectory, notes: Notes, text: str | None, tags: Sequence[str]
) -> None:
    """Refuse to take away what is not there.

    Raises:
        UserError: the run has no such note, or no such tag.
    """
    for tag in tags:
        if tag not in notes.tags:
            there = listed(notes.tags) or "none"
            raise UserError(f"{run.root} has no tag {tag!r}; its tags: {there}")
    if text is not None and text not in notes.texts:
        raise UserError(
            f"{run.root} has no note {text!r}: `peerlearn note {run.root}` prints its notes"
        )
