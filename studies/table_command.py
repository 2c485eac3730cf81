"""`peerlearn table`: the tables of a study, whatever it has measured so far."""

import os
from collections.abc import Sequence
from pathlib import Path

from peerlearn.config import ArgumentParser, find_config
from peerlearn.errors import DONE, UserError
from peerlearn.evaluation.plots import PICTURE_FORMATS
from peerlearn.runs.directory import STUDY_FILE
from studies.due import problems
from studies.runner import jobs_now, work_of
from studies.study import is_study, load_study, plan_study
from studies.study_command import SHIPPED, refuse_old
from studies.study_file import read_study


def main(argv: Sequence[str]) -> int:
    """`peerlearn table FOLDER|NAME [--only GRID]`.

    Returns:
        The exit code.
    """
    from studies.report import report

    parser = ArgumentParser(
        prog="peerlearn table",
        description="Print the tables of a study: mean and standard deviation over seeds, paired differences, and the "
        "published figures beside them. They are also written as STUDY/table.csv, .json, .md, .tex and .png. Of a "
        "shipped study that has not run, the published figures alone. Example: peerlearn table table_8_cifar100",
        allow_abbrev=False,
    )
    parser.add_argument("study", metavar="FOLDER|NAME", help="a study's folder, or a shipped study")
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="GRID", help="grids to show (default: all)"
    )
    parser.add_argument(
        "--pictures",
        choices=PICTURE_FORMATS,
        help="format of the picture of the tables (default: the study's, which is png if it names none)",
    )
    words = parser.parse_args(argv)
    folder = Path(words.study)
    if not folder.is_dir():
        config = read_study(find_config(words.study, SHIPPED))
        folder = Path(config.folder)
        if not is_study(folder):
            report(plan_study(config, words.only), [], write=False)
            return DONE
    refuse_old(folder)
    if not is_study(folder):
        raise UserError(f"{folder} holds no study: it has no {STUDY_FILE}")
    study = load_study(folder, only=words.only)
    work = work_of(study)
    mine = (folder / STUDY_FILE).stat().st_uid == os.getuid()
    report(
        study,
        problems(work, jobs_now(work, study.config)),
        write=mine and not words.only,
        pictures=words.pictures,
    )
    return DONE
