"""The skeleton of evaluators, around a score that is known beforehand and costs nothing."""

import json
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import pytest

from peerlearn.errors import NotThereYetError, UsageError, UserError
from peerlearn.evaluation.confusion import plot_confusion
from peerlearn.evaluation.evaluator import Evaluator, EvaluatorConfig, run
from peerlearn.evaluation.results import Score, mean_over_runs
from peerlearn.evaluation.score_table import ci95_column, metric_column
from peerlearn.evaluation.selection import Selection, select_networks
from peerlearn.export import export_hash
from peerlearn.runs.training_facts import TrainingFacts, write_env


@dataclass(frozen=True, kw_only=True)
class ShotsConfig(EvaluatorConfig):
    """As few-shot evaluation has it.

    Attributes:
        shots: numbers of shots.
    """

    shots: int | list[int] = 5


def accuracy(run_seed: int, network: str, shots: int) -> float:
    return 50.0 + shots + 10 * run_seed + {"0": 0.25, "1": 0.5, "ensemble": 0.75}[network]


def score(config: ShotsConfig, selection: Selection, ranks: object) -> Iterator[Score]:
    assert selection.run is not None
    seed = int(selection.run.name)
    names = [*selection.folders, *(["ensemble"] if selection.ensemble else [])]
    for name in filter(selection.wants, names):
        for shots in config.shots if isinstance(config.shots, list) else [config.shots]:
            yield Score(
                network=name,
                dataset="digits",
                metrics={"accuracy": accuracy(seed, name, shots), "accuracy_ci95": 0.84, "n": 600},
                protocol={"shots": shots},
                variant=f"{shots} shots",
            )


FEWSHOT = Evaluator(
    verb="fewshot",
    config=ShotsConfig,
    score=score,
    columns=[ci95_column("accuracy", "accuracy", "accuracy_ci95")],
    title=lambda config: "5-way accuracy (%)",
    description="Few shots.",
    example="peerlearn fewshot --checkpoint runs/a",
    average=partial(mean_over_runs, names=["accuracy"]),
)


def drawn_by(picture: Callable[[Path], object]) -> Evaluator[ShotsConfig]:
    """The same, with a picture of each score."""

    def drawn(config: ShotsConfig, selection: Selection, ranks: object) -> Iterator[Score]:
        return (replace(each, pictures={"": picture}) for each in score(config, selection, ranks))

    return replace(FEWSHOT, score=drawn)


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    """What is left of two runs of two networks, for those who load none."""
    for seed in (0, 1):
        folder = tmp_path / str(seed)
        for network in (0, 1):
            export = folder / f"export/step-00000012/net-{network}"
            export.mkdir(parents=True)
            (export / "model.safetensors").write_text(f"weights {seed} {network}")
            (export / "config.json").write_text("{}")
        (folder / "config.yaml").write_text("")
        facts = TrainingFacts(
            dataset="digits", data_root=None, images=1437, seed=70 + seed, lr=0.1, processes=1
        )
        write_env(folder / "env.json", "pretrain", facts)
    return [tmp_path / "0", tmp_path / "1"]


def evaluate(evaluator: Evaluator[ShotsConfig], *words: str | Path) -> int:
    return run(evaluator, [*map(str, words), "--device", "cpu"])


def results(folder: Path) -> dict[tuple[str, int], dict]:
    """By network and shots."""
    found = [json.loads(path.read_text()) for path in folder.glob("fewshot-digits-00000012-*.json")]
    return {(each["network"], each["protocol"]["shots"]): each for each in found}


def test_each_score_is_a_file_and_a_row(runs, capsys):
    assert evaluate(FEWSHOT, "--checkpoint", runs[0], "--shots", "1", "5") == 0
    found = results(runs[0] / "results")
    assert set(found) == {(name, shots) for name in ("0", "1", "ensemble") for shots in (1, 5)}
    hashes = {
        name: export_hash(runs[0] / f"export/step-00000012/net-{name}") for name in ("0", "1")
    }
    for (name, shots), result in found.items():
        assert result["metrics"]["accuracy"] == accuracy(0, name, shots)
        assert (result["task"], result["step"], result["seed"]) == ("fewshot", 12, 70)
        assert result["export_hash"] == hashes.get(name, hashes)
    printed = capsys.readouterr().out
    assert "5-way accuracy (%)" in printed
    assert "n 600" in printed
    rows = [line.strip("│ ").split("│") for line in printed.splitlines() if "shots" in line]
    assert [[cell.strip() for cell in row] for row in rows][:2] == [
        ["0, 1 shots", "51.25 +- 0.84"],
        ["0, 5 shots", "55.25 +- 0.84"],
    ]


def test_several_runs_are_averaged_as_the_evaluator_says(runs, tmp_path, capsys):
    folder = tmp_path / "mean"
    assert evaluate(FEWSHOT, "--checkpoint", *runs, "--results", folder, "--network", "1") == 0
    means = [each for each in results(folder).values() if "runs" in each["metrics"]]
    (mean,) = means
    values = [accuracy(0, "1", 5), accuracy(1, "1", 5)]
    assert set(mean["metrics"]) == {"n", "runs", "accuracy"}
    assert mean["metrics"]["accuracy"]["values"] == values == [55.5, 65.5]
    assert mean["metrics"]["accuracy"]["mean"] == 60.5
    # Student's t with one degree of freedom: 12.706 x 10 / sqrt(2) / sqrt(2), which would be -3.03 .. 124.03.
    assert mean["metrics"]["accuracy"]["ci95"] == pytest.approx(63.53, abs=0.01)
    printed = capsys.readouterr().out
    assert "60.50" in printed
    assert "63.53" not in printed
    assert "n 600, 2 runs: mean +- ci95 (none of two runs)" in " ".join(printed.split())


def test_without_names_every_decimal_number_that_all_runs_have_is_averaged():
    first = {"ap": 50.0, "ap75": None, "n": 7, "per_class": {"cat": 1.0}}
    found = mean_over_runs([first, {**first, "ap": 52.0, "ap75": 3.0}])
    assert set(found) == {"n", "runs", "ap"}
    assert (found["ap"]["mean"], found["n"], found["runs"]) == (51.0, 7, 2)


def test_a_dry_run_prints_the_config_and_refuses_a_checkpoint_that_is_not_there(capsys):
    with pytest.raises(NotThereYetError, match="--checkpoint nowhere is not there"):
        run(FEWSHOT, ["--checkpoint", "nowhere", "--shots", "3", "--dry_run"])
    expected = (
        "checkpoint: nowhere\nnetwork: all\ndevice: auto\nresults: null\npictures: png\nshots: 3\n"
    )
    assert capsys.readouterr().out == expected


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--checkpoint", ""], "checkpoint: expected text or a list of text, got ''"),
        (["--checkpoint", "[]"], "checkpoint must name at least one"),
    ],
)
def test_no_checkpoint_is_refused(words, message):
    with pytest.raises(UsageError, match=message):
        run(FEWSHOT, words)


def test_an_evaluator_may_have_no_ensembles(runs):
    alone = replace(FEWSHOT, ensembles=False)
    assert evaluate(alone, "--checkpoint", runs[0]) == 0
    assert {name for name, _ in results(runs[0] / "results")} == {"0", "1"}
    for more in ([], ["--dry_run"]):
        words = ["--checkpoint", str(runs[0]), "--network", "ensemble", *more]
        with pytest.raises(UsageError, match="--network ensemble: networks are scored one by one"):
            run(alone, words)
    with pytest.raises(UsageError, match="one by one"):
        select_networks(runs[0], "ensemble", ensembles=False)
    with pytest.raises(UsageError) as refused:
        select_networks(runs[0], "7", ensembles=False)
    assert str(refused.value).endswith("choose from 0, 1, all")


def test_an_ensemble_alone_is_scored_alone(runs):
    assert evaluate(FEWSHOT, "--checkpoint", runs[0], "--network", "ensemble") == 0
    assert set(results(runs[0] / "results")) == {("ensemble", 5)}


def test_scores_that_the_table_cannot_tell_apart_are_a_mistake_of_the_evaluator(runs):
    def twice(*arguments: object) -> Iterator[Score]:
        return (replace(each, variant="") for each in score(*arguments))  # type: ignore[arg-type]

    words = ["--checkpoint", runs[0], "--shots", "1", "5"]
    with pytest.raises(ValueError, match="two scores are called '0'"):
        evaluate(replace(FEWSHOT, score=twice), *words)


def test_a_picture_lies_beside_its_score(runs):
    evaluator = drawn_by(lambda file: file.write_bytes(b"drawn"))
    assert evaluate(evaluator, "--checkpoint", runs[0]) == 0
    pictures = sorted((runs[0] / "results").glob("*.png"))
    assert [path.read_bytes() for path in pictures] == [b"drawn"] * 3
    jsons = sorted((runs[0] / "results").glob("*.json"))
    assert [path.with_suffix(".json") for path in pictures] == jsons


def test_a_score_may_have_several_pictures(runs):
    def drawn(config: ShotsConfig, selection: Selection, ranks: object) -> Iterator[Score]:
        pictures = {
            "": lambda file: file.write_bytes(b"one"),
            "-broken.png": full_disk,
            "-two": lambda file: file.write_bytes(b"two"),
        }
        return (replace(each, pictures=pictures) for each in score(config, selection, ranks))

    assert evaluate(replace(FEWSHOT, score=drawn), "--checkpoint", runs[0], "--network", "0") == 0
    (result,) = (runs[0] / "results").glob("*.json")
    pictures = {path.name: path.read_bytes() for path in result.parent.glob("*.png")}
    assert pictures == {f"{result.stem}.png": b"one", f"{result.stem}-two.png": b"two"}


def bad_text(file: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure()
    figure.suptitle("a", color="x^^")
    figure.savefig(file)


def full_disk(file: Path) -> None:
    file.write_bytes(b"half a pic")
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize(
    ("picture", "reason"), [(bad_text, "x^^"), (full_disk, "No space left on device")]
)
def test_a_picture_that_fails_costs_one_line_and_no_score(picture, reason, runs, caplog, capsys):
    evaluator = drawn_by(picture)
    # Of an earlier measurement, which may have been of something else.
    assert evaluate(drawn_by(lambda file: file.write_bytes(b"old")), "--checkpoint", runs[0]) == 0
    capsys.readouterr()
    words = ["--checkpoint", runs[0], "--network", "0"]
    assert evaluate(evaluator, *words) == 0
    assert results(runs[0] / "results")["0", 5]["metrics"]["accuracy"] == 55.25
    assert "55.25 +- 0.84" in capsys.readouterr().out
    (warning,) = [r for r in caplog.records if r.levelno == logging.WARNING]
    assert "\n" not in warning.getMessage()
    assert len(warning.getMessage()) < 400
    assert reason in warning.getMessage()
    assert not list(runs[0].glob("results/*-0-*.png"))
    assert len(list(runs[0].glob("results/*.png"))) == 2


def test_a_class_called_like_a_formula_is_drawn(tmp_path):
    import torch

    confusion = torch.tensor([[3, 1], [0, 2]])
    plot_confusion(tmp_path / "a.png", confusion, ["$x^^$", "dog"], title="two")
    assert (tmp_path / "a.png").stat().st_size > 5000


def test_results_that_cannot_be_written_are_one_line(runs, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="choose another folder by --results"):
        evaluate(FEWSHOT, "--checkpoint", runs[0], "--results", tmp_path / "file")


def test_cells():
    ap = metric_column("AP", "ap")
    assert ap.cell([{"ap": 51.234}]) == "51.23"
    assert ap.cell([{"ap": 50.0}, {"ap": 53.0}]) == "51.50 +- 2.12"
    assert ap.cell([{"ap": None}]) == ""
