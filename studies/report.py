"""The report of a study: its tables and what is missing, printed and in files."""

from collections.abc import Sequence
from functools import partial

from peerlearn.evaluation.plots import PictureFormat, draw
from peerlearn.runs.files import write_text
from peerlearn.runs.output import show
from studies.cost import study_costs
from studies.evaluations import Problem
from studies.formats import as_csv, as_json, as_latex, as_markdown, as_text, problem_text
from studies.picture import plot_tables
from studies.scores import score_study
from studies.study import Study, unwritable
from studies.table import Table, tables, unknown_scores


def report(
    study: Study,
    problems: Sequence[Problem],
    *,
    write: bool,
    pictures: PictureFormat | None = None,
) -> list[Problem]:
    """Print the tables and what is missing; if asked, write them into STUDY/table.{csv,json,md,tex,png}.

    Args:
        study: study whose runs are read.
        problems: what is known to be missing; what cannot be read or compared is added.
        write: whether to write the files.
        pictures: format of the picture; None = the study's.

    Returns:
        Everything that is missing.

    Raises:
        UserError: the folder cannot be written.
    """
    scores, found = score_study(study)
    missing = list(dict.fromkeys([*problems, *found, *unknown_scores(study, scores)]))
    shown = tables(study, scores, study_costs(study))
    _print(study, shown, missing)
    if not write:
        return missing
    file, ending = study.root / "table", pictures or study.config.pictures
    try:
        study.root.mkdir(parents=True, exist_ok=True)
        write_text(file.with_suffix(".csv"), as_csv(study, shown, scores))
        write_text(file.with_suffix(".json"), as_json(study, shown, scores, missing))
        write_text(file.with_suffix(".md"), as_markdown(shown, missing))
        write_text(file.with_suffix(".tex"), as_latex(shown))
        if shown:
            draw(partial(plot_tables, shown), file.with_suffix(f".{ending}"))
    except OSError as error:
        raise unwritable(study.root, error) from error
    print(f"table: {file}.md, .csv, .json, .tex, .{ending}", flush=True)
    return missing


def _print(study: Study, shown: Sequence[Table], missing: Sequence[Problem]) -> None:
    from rich.text import Text

    for table in shown:
        show(as_text(table), Text(f"{table.caption}\n"))
    for grid in study.grids:
        if not any(table.grid == grid for table in shown):
            print(f"{grid}: nothing is measured yet")
    for problem in missing:
        print(f"missing: {problem_text(problem)}")
