"""The reference is made from the code, and what runs write is what it tells of."""

import ast
import importlib
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from peerlearn import HOME
from peerlearn.runs import file_guide, metric_guide
from peerlearn.runs.directory import RunDirectory
from peerlearn.runs.event_guide import EVENTS
from tests.contract.test_layout import module_name, source_files
from tests.e2e.runs import pretrain, write_noise

QUICK = ["--data.limit", "64", "--queue.size", "32", "--epochs", "1", "--data.workers", "0"]
# More figures than by default, of methods that need no labels.
FIGURES = [
    "--monitor.key_networks",
    "true",
    "--monitor.linear",
    "true",
    "--monitor.test_limit",
    "50",
]
METHODS = {
    "moco": [*FIGURES, "--queue.momentum_schedule", "cosine"],
    "simclr": FIGURES,
    "supervised": ["--method", "supervised", "--supervised.teaching", "ensemble_teaching"],
    "prototypical": [
        *("--method", "prototypical", "--data.name", "folder", "--prototypical.ways", "2"),
        *("--prototypical.queries", "2", "--prototypical.steps_per_epoch", "2"),
        *("--prototypical.validation_ways", "2", "--prototypical.validation_queries", "2"),
        *("--prototypical.validation_episodes", "4"),
    ],
}  # fmt: skip


def reference() -> ModuleType:
    spec = importlib.util.spec_from_file_location("reference", HOME / "scripts/reference.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_reference_is_the_one_that_the_code_gives():
    """Red? Run `python scripts/reference.py`."""
    made = reference()
    written = {path.name: path.read_text() for path in made.FOLDER.glob("*.md")}
    pages = made.pages()
    stale = [name for name in {*written, *pages} if written.get(name) != pages.get(name)]
    assert not stale, f"{stale} are not what the code gives: run `python scripts/reference.py`"


def events_of(file: Path) -> Iterator[tuple[str, set[str]]]:
    """The kinds of every ``.event(...)`` call in a file, and the names of the facts beside it."""
    for node in ast.walk(ast.parse(file.read_text())):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
            continue
        if node.func.attr != "event" or not node.args:
            continue
        facts = {word.arg for word in node.keywords if word.arg}
        parts = [node.args[0]]
        if isinstance(parts[0], ast.IfExp):
            parts = [parts[0].body, parts[0].orelse]
        for part in parts:
            if isinstance(part, ast.Name):
                module = importlib.import_module(module_name(file.relative_to(HOME).as_posix()))
                yield getattr(module, part.id), facts
            else:
                assert isinstance(part, ast.Constant), ast.dump(part)
                yield part.value, facts


def test_every_event_of_the_code_is_told_of_with_its_facts():
    found: dict[str, set[str]] = {}
    for name, text in source_files().items():
        if ".event(" in text:
            for kind, facts in events_of(HOME / name):
                found.setdefault(kind, set()).update(facts)
    assert found.keys() == EVENTS.keys()
    for kind, facts in found.items():
        told = EVENTS[kind][1].keys()
        # Facts that one word stands for come from the caller.
        assert facts <= told, kind
        assert told - facts <= ({"images"} if kind == "step_skipped" else set()), kind


@pytest.mark.parametrize("method", METHODS)
def test_a_run_writes_no_name_that_the_reference_lacks(method: str, tmp_path: Path):
    words = [*QUICK, *METHODS[method]]
    if method == "prototypical":
        root = tmp_path / "data"
        write_noise(
            root, {f"{split}/{split}{c}": 6 for split in ("train", "val", "test") for c in "ab"}
        )
        words += ["--data.root", str(root), "--data.limit", "12", "--batch_size", "256"]
    elif method == "simclr":
        words += ["--method", "simclr"]
    run = RunDirectory(tmp_path / "run")
    assert pretrain(run.root, *words) == 0
    names = {name for row in run.metric_rows() for name in row}
    assert {name for name in names if metric_guide.meaning_of(name) is None} == set()
    assert {event["event"] for event in run.events()} <= EVENTS.keys()
    assert len(names) > 15
    files = {
        path.relative_to(run.root).as_posix() for path in run.root.rglob("*") if path.is_file()
    }
    assert {file for file in files if file_guide.meaning_of(file) is None} == set()


def test_a_name_that_no_run_writes_is_not_explained():
    assert metric_guide.meaning_of("net/0/knn_top2") is None
    assert metric_guide.meaning_of("loss_of_time") is None
    assert file_guide.meaning_of("checkpoints/step-1/state.json") is None
