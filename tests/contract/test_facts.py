"""One home for each fact that several parts must agree on: elsewhere its literal does not stand in the code."""

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from peerlearn import HOME, PACKAGES
from peerlearn.config import changeable_keys
from pretrain.config import PretrainConfig

ROOT = Path(__file__).parents[2]
RUN = "peerlearn/runs/directory.py"
EXPORT = "peerlearn/runs/export_folders.py"
# Whole literals, and where each stands.
NAMES = {
    **dict.fromkeys(["config.yaml", "env.json", "metrics.jsonl", "events.jsonl", "tb"], RUN),
    **dict.fromkeys(["checkpoints", "attempt-", "DONE", "FAILED", "study.yaml"], RUN),
    **dict.fromkeys(["model.safetensors", "config.json", "README.md", "key-", "net-"], EXPORT),
    **dict.fromkeys(["manifest.json", "state.json", ".bad"], "peerlearn/runs/checkpoint.py"),
    **dict.fromkeys(["latest", "step-"], "peerlearn/runs/step_folders.py"),
    **dict.fromkeys(["outcomes", "submission.json", "jobs.json"], "slurm/submission.py"),
    "owner.json": "peerlearn/runs/lock.py",
    "standing.json": "peerlearn/runs/standing.py",
}


@cache
def literals() -> dict[str, list[str]]:
    """The text literals of every source file, parts of f-strings too."""
    files = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]
    return {path.relative_to(ROOT).as_posix(): list(texts_of(path)) for path in files}


def texts_of(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


@pytest.mark.parametrize(("name", "home"), NAMES.items())
def test_a_name_of_a_file_or_folder_stands_in_one_file(name: str, home: str):
    assert [file for file, texts in literals().items() if name in texts] == [home]


def test_names_of_scores_are_written_and_parsed_in_one_file():
    home = "peerlearn/runs/score_names.py"
    spelt = re.compile(r"(^|\W)(net|ensemble|pixels|knn)/|/\w+_top1")
    found = {
        (file, text)
        for file, texts in literals().items()
        for text in texts
        if spelt.search(text) and "\n" not in text and file != home
    }
    assert not found


def test_one_function_hashes_files():
    hashing = [path for path in literals() if "file_digest" in (ROOT / path).read_text()]
    assert hashing == ["peerlearn/runs/files.py"]


def test_docs_list_the_keys_that_may_change_on_resume():
    """The fields themselves say so, by `changeable`; refusal and help read it there."""
    keys = ", ".join(f"`{key}`" for key in changeable_keys(PretrainConfig))
    assert f"| {keys} |" in (HOME / "docs/runs.md").read_text()
