"""`peerlearn study`, and `peerlearn resume` of one: grids x seeds of pretraining, evaluations, tables."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args, get_type_hints

from peerlearn.config import ArgumentParser, find_config
from peerlearn.errors import DONE, UsageError, UserError
from peerlearn.evaluation.plots import PICTURE_FORMATS
from peerlearn.runs.directory import FORMER_FILES, STUDY_FILE, RunDirectory
from slurm.plan import launched
from studies.config import StudyConfig
from studies.evaluations import fixed_evaluations
from studies.minutes import check_here, print_minutes
from studies.runner import check_places, go_on, place_of
from studies.study import Study, check_folder, is_study, plan_study, write_study
from studies.study_file import axis_of_values, make_study, read_exports, read_study

SHIPPED = Path(__file__).parent / "configs"


def main(argv: Sequence[str]) -> int:
    """`peerlearn study FILE|NAME [--key value ...] [--dry_run]`.

    Returns:
        The exit code.
    """
    words = _parser("study").parse_args(argv)
    study = _planned(words)
    return _start(study, words, again=False)


def resume(argv: Sequence[str]) -> int:
    """`peerlearn resume STUDY [--key value ...] [--dry_run]`.

    Returns:
        The exit code.
    """
    words = _parser("resume").parse_args(argv)
    refuse_old(Path(words.file))
    if words.folder not in (None, words.file):
        raise UsageError("--folder: a study goes on where it lies; move the folder instead")
    return _start(_planned(words), words, again=True)


def _start(study: Study, words: argparse.Namespace, *, again: bool) -> int:
    if words.minutes:
        if not words.dry_run:
            raise UsageError(
                "--minutes goes with --dry_run: it tells how long the study would take"
            )
        check_here(study.config)
    check_folder(study)
    evaluations = fixed_evaluations(study.root, study.config.evaluate)
    check_places(study.config)
    images = check_runs(study)
    if words.dry_run:
        from studies.plan_table import print_plan

        print_plan(study, images, verbose=words.verbose)
        if words.minutes:
            print_minutes(study)
        return DONE
    write_study(study, evaluations)
    return go_on(study, again=again, watching=again)


def _planned(words: argparse.Namespace) -> Study:
    """The study that the command line names."""
    folder = Path(words.file or "")
    instead: dict[str, Any] = {
        key: getattr(words, key)
        for key in (
            *("folder", "seeds", "pretrain", "cluster", "evaluation_cluster"),
            *("throttle", "keep", "watch", "interval_seconds", "exports", "score", "pictures"),
        )
    }
    instead["evaluate"] = words.evaluate or None
    if words.exports is not None:
        instead["exports"] = read_exports(words.exports)
    if words.file is None:
        config = _without_file(words, instead)
    elif folder.is_dir():
        refuse_old(folder)
        if not is_study(folder):
            raise UsageError(f"{folder} is a folder, but no study's: it has no {STUDY_FILE}")
        # A study's folder may have been moved after its file was written.
        config = read_study(folder / STUDY_FILE, **instead | {"folder": str(folder)})
    else:
        config = read_study(find_config(words.file, SHIPPED), **instead)
    if words.grid and words.file is not None:
        raise UsageError("--grid stands for a file: write the axis into the file's grids")
    refuse_old(Path(config.folder))
    return plan_study(config, words.only)


def _without_file(words: argparse.Namespace, instead: dict[str, Any]) -> StudyConfig:
    """The config of a study that stands on the command line alone."""
    for key, example in (
        ("pretrain", '"mcl_fashion_mnist_demo --epochs 20"'),
        ("folder", "runs/lr"),
    ):
        if getattr(words, key) is None:
            raise UsageError(
                f"name a file or a shipped study (`peerlearn configs`), or give --{key} {example}"
            )
    axes: dict[str, dict[str, str]] = {}
    try:
        for word in words.grid:
            key, _, values = word.partition("=")
            if not values:
                raise UsageError(f"--grid: expected KEY=VALUE,VALUE,..., got {word!r}")
            axes[key] = axis_of_values(f"--grid: {key}", key, values.split(","))
        given = {key: value for key, value in instead.items() if value is not None}
        grids = {"grid": axes or {"pretraining": {"as given": ""}}}
        return make_study(grids, **{"seeds": [0], **given})
    except ValueError as error:
        raise UsageError(str(error)) from error


def refuse_old(folder: Path) -> None:
    """Refuse a folder of an earlier version's sweep or pipeline.

    Raises:
        UsageError: the folder is one; the message says what to write instead.
    """
    for name in FORMER_FILES:
        if (folder / name).is_file():
            raise UsageError(
                f"{folder} holds the {name.removesuffix('.yaml')} of an earlier version: write its grids, seeds and "
                'evaluate lines into a study (docs/studies.md, "From sweeps and pipelines") and give another folder'
            )


def check_runs(study: Study) -> dict[str, int]:
    """Make sure that the runs which are still to start will find their images and networks.

    Returns:
        The number of images that all steps of a run of each such variant take, by the variant's name.

    Raises:
        UserError: they will not; the message names the cell.
    """
    # Imported here: a wrong key should not wait for torch.
    from pretrain.preview import preview

    place = place_of(study.config.cluster)
    missing = {run.variant.name for run in study.runs if not RunDirectory(run.folder).begun}
    images: dict[str, int] = {}
    for cell in study.cells:
        if cell.variant.name in missing - images.keys():
            try:
                with launched(place.nodes * place.tasks_per_node):
                    images[cell.variant.name] = preview(cell.variant.config).images
            except UserError as error:
                raise UserError(f"grids: {cell.title}: {error}") from error
    return images


def _parser(verb: str) -> ArgumentParser:
    resumed = verb == "resume"
    parser = ArgumentParser(
        prog=f"peerlearn {verb}",
        description="Try again what failed in a study, do what is missing, and stay until everything is measured. "
        "Changed keys count from now on. Example: peerlearn resume runs/lr --seeds 0 1 2 3"
        if resumed
        else "Pretrain grids of configs with several seeds, evaluate their exports, and compare them in tables. The "
        "same command again goes on with it. Example: peerlearn study table_8_digits. Without a file: "
        'peerlearn study --pretrain "mcl_fashion_mnist_demo --epochs 20" --grid base_lr=0.03,0.06 --seeds 0 1 2 '
        '--evaluate "knn --k 20" --folder runs/lr',
        allow_abbrev=False,
    )
    add, hints = parser.add_argument, get_type_hints(StudyConfig)
    if resumed:
        add("file", metavar="STUDY", help="folder of the study")
    else:
        add("file", nargs="?", help="a YAML file, a shipped study's name, or a study's folder")
    add("--folder", help="folder of the study (default: the file's)")
    add("--seeds", type=int, nargs="+", help="seeds of the runs (default: the file's)")
    add("--pretrain", metavar="WORDS", help="words common to all runs (default: the file's)")
    add("--grid", nargs="+", action="extend", default=[], metavar="KEY=V1,V2",
        help="without a file: an axis of the grid, by the values of a config key")  # fmt: skip
    add("--only", nargs="+", default=[], metavar="GRID", help="grids to run (default: all)")
    add("--evaluate", nargs="+", action="extend", default=[], metavar="LINE",
        help="evaluations of each run, without --checkpoint (default: the file's)")  # fmt: skip
    add("--exports", help="exports to evaluate: last, all, or an interval in epochs")
    add("--score", nargs="+", metavar="TASK/METRIC", help="scores of the tables, linear/top1 say")
    add("--cluster", help="place of the runs: here, local, or a cluster's profile (default: here)")
    add("--evaluation_cluster", help="profile of the evaluations (default: that of the runs)")
    add("--throttle", type=int, help="largest number of runs, and of evaluations, at once")
    add(
        "--keep",
        choices=get_args(hints["keep"]),
        help="what stays of a run once it is evaluated (default: all)",
    )
    add(
        "--watch",
        choices=get_args(hints["watch"]),
        help="place of what submits evaluations (default: job)",
    )
    add(
        "--pictures",
        choices=PICTURE_FORMATS,
        help="format of the picture of the tables (default: png)",
    )
    add("--interval_seconds", type=float, help="seconds from one look at the runs to the next")
    add("--dry_run", action="store_true", help="check everything and print what would run")
    add("--verbose", action="store_true", help="with --dry_run: print every command")
    add("--minutes", action="store_true",
        help="with --dry_run: time a few steps of each config, and print how long its runs would take")  # fmt: skip
    return parser
