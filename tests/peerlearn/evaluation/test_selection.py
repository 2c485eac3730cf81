from pathlib import Path

from peerlearn.evaluation.selection import Selection, differences


def exports_of(run: Path | None, step: int, config: str = "") -> Selection:
    if run is not None:
        run.mkdir()
        (run / "config.yaml").write_text(config)
    return Selection(
        folders={"0": Path("x")}, ensemble=False, alone=True, exports=Path("x"), run=run, step=step
    )


def test_runs_that_differ_in_their_seeds_are_alike(tmp_path):
    config = "run: {0}\nseed: {0}\nbase_lr: 0.1\ncohort:\n  networks: 2\n"
    runs = [exports_of(tmp_path / str(seed), 9, config.format(seed)) for seed in range(3)]
    assert differences(runs) == []


def test_what_tells_runs_of_two_kinds_apart_is_named(tmp_path):
    one = exports_of(tmp_path / "a", 9, "seed: 0\nbase_lr: 0.1\ncohort:\n  backbones: [conv4]\n")
    other = exports_of(tmp_path / "b", 15, "seed: 1\nbase_lr: 0.2\ncohort:\n  backbones: [wrn]\n")
    third = exports_of(tmp_path / "c", 9, "seed: 2\nbase_lr: 0.1\ncohort:\n  backbones: [wrn]\n")
    assert differences([one, other, third]) == [
        "step (9, 15)",
        "base_lr (0.1, 0.2)",
        "cohort.backbones (['conv4'], ['wrn'])",
    ]
    assert differences([one]) == []


def test_exports_without_a_run_are_compared_by_their_steps(tmp_path):
    run = exports_of(tmp_path / "a", 9, "base_lr: 0.1\n")
    assert differences([run, exports_of(None, 9)]) == []
    assert differences([run, exports_of(None, 0)]) == ["step (9, 0)"]
