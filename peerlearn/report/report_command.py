"""`peerlearn report`: a page about runs, or about a study, as one file to send around."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryFile

from peerlearn.config import ArgumentParser
from peerlearn.errors import DONE, UsageError, UserError
from peerlearn.report.page import render_page
from peerlearn.report.parts import Section
from peerlearn.report.run_facts import full_path, unique_folders
from peerlearn.report.run_page import run_sections
from peerlearn.report.study_page import is_study, study_sections
from peerlearn.runs.directory import RunDirectory
from peerlearn.runs.files import replacing
from peerlearn.runs.text import listed, printable

_NAME = "report.html"
_ENDINGS = (".html", ".htm")


def main(argv: Sequence[str]) -> int:
    """`peerlearn report RUN|STUDY ... [-o FILE] [--no_images]`. Returns the exit code."""
    arguments = _parse(argv)
    folders = unique_folders(arguments.folders)
    studies = [folder for folder in folders if _checked_is_study(folder)]
    if studies and len(folders) > 1:
        raise UserError(
            f"{studies[0]} is a study: a page is of one study, or of runs; name it alone"
        )
    output = arguments.output or (folders[0] / _NAME if len(folders) == 1 else Path(_NAME))
    _check_output(output)
    images = not arguments.no_images
    sections = (
        study_sections(folders[0], images=images)
        if studies
        else run_sections([RunDirectory(folder) for folder in folders], images=images)
    )
    size = _write(output, _title(folders, is_of_study=bool(studies)), sections)
    print(f"report: {printable(str(output))} ({size / 1e6:.2f} MB)", flush=True)
    return DONE


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = ArgumentParser(
        prog="peerlearn report",
        description="Write a page about runs, or about a study, as one HTML file: how they stand, scores, curves, "
        "pictures, configs, events. The file holds all that it shows and loads nothing. "
        "Example: peerlearn report runs/a runs/b -o report.html",
        epilog="A run may still train. What cannot be read of a run stands in the page.",
    )
    parser.add_argument(
        "folders", nargs="+", type=Path, metavar="RUN|STUDY", help="run directories, or one study"
    )
    parser.add_argument(
        *("-o", "--output"),
        type=Path,
        metavar="FILE",
        help=f"file to write (default: {_NAME} in the run or study; of several runs, in this folder)",
    )
    parser.add_argument(
        "--no_images",
        action="store_true",
        help="leave out what takes the data and the networks of the runs: views, neighbours, maps of features",
    )
    return parser.parse_args(argv)


def _checked_is_study(folder: Path) -> bool:
    """Whether a folder is a study, not a run.

    Raises:
        UserError: it is neither, or cannot be read.
    """
    try:
        if is_study(folder):
            return True
        if not folder.is_dir():
            what = "is a file" if folder.exists() else "is not there"
            raise UserError(f"{folder} {what}: name run directories, or a study")
        run = RunDirectory(folder)
        # A run whose config is lost has its metrics still.
        is_run = run.begun or run.metrics.is_file()
    except OSError as error:
        raise UserError(
            f"{folder} cannot be read ({error.strerror}): name a folder that you may read"
        ) from error
    if not is_run:
        raise UserError(
            f"{folder} is neither a run nor a study: it has no config.yaml, and no study.yaml; "
            "`peerlearn runs` lists runs"
        )
    return False


def _check_output(output: Path) -> None:
    """Refuse, before the work, an output that would replace what is no page, or that cannot be written.

    Raises:
        UsageError: the file's name does not end in .html.
        UserError: the output is a folder, or no file can be made in its folder.
    """
    try:
        is_folder = output.is_dir()
    except OSError as error:
        raise _unwritable(output, error) from error
    if is_folder:
        raise UserError(f"{output} is a folder: name a file by --output, such as {output / _NAME}")
    if output.suffix.lower() not in _ENDINGS:
        raise UsageError(f"--output: expected a name that ends in .html, got {str(output)!r}")
    try:
        with TemporaryFile(dir=output.absolute().parent):
            pass
    except OSError as error:
        raise _unwritable(output, error) from error


def _unwritable(output: Path, error: OSError) -> UserError:
    return UserError(f"{output}: cannot be written ({error.strerror}): choose another --output")


def _title(folders: Sequence[Path], *, is_of_study: bool) -> str:
    names = [full_path(folder).name for folder in folders]
    if is_of_study:
        return f"Study {printable(names[0])}"
    return (
        f"Run {printable(names[0])}" if len(names) == 1 else f"{len(names)} runs: {listed(names)}"
    )


def _write(output: Path, title: str, sections: Sequence[Section]) -> int:
    """Write the page as a whole; returns its size in bytes.

    Raises:
        UserError: the file cannot be written.
    """
    content = render_page(title, sections).encode()
    try:
        with replacing(output) as file:
            file.write(content)
    except OSError as error:
        raise _unwritable(output, error) from error
    return len(content)
