"""What holds the house together: who imports whom, what ships, and that the documents point at real things."""

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from peerlearn import PACKAGES
from peerlearn.cli import VERBS, check_siblings
from peerlearn.errors import UserError

ROOT = Path(__file__).parents[2]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])


def imported_packages(file: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize(
    ("package", "forbidden"),
    [
        ("peerlearn", {"pretrain", "linear_eval", "detection", "fewshot", "slurm", "tests"}),
        ("pretrain", {"linear_eval", "detection", "fewshot", "slurm", "tests"}),
        ("linear_eval", {"pretrain", "detection", "fewshot", "slurm", "tests"}),
        ("slurm", {"pretrain", "linear_eval", "detection", "fewshot", "tests"}),
    ],
)
def test_no_package_imports_one_it_must_not_know(package, forbidden):
    files = list((ROOT / package).rglob("*.py"))
    assert files
    for file in files:
        assert not imported_packages(file) & forbidden, file


def test_the_wheel_and_the_start_up_check_name_every_package():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    listed = project["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
    present = sorted(path.parent.name for path in ROOT.glob("*/__init__.py"))
    assert sorted(listed) == present == sorted(PACKAGES)
    assert PACKAGES[0] == "peerlearn"
    assert "Private :: Do Not Upload" in project["project"]["classifiers"]


def test_a_stray_file_that_would_win_is_named(tmp_path, monkeypatch):
    (tmp_path / "pretrain.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "pretrain", raising=False)
    with pytest.raises(UserError, match=re.escape(str(tmp_path / "pretrain.py"))):
        check_siblings()


def test_help_answers_without_torch():
    code = (
        "import sys; from peerlearn.cli import main; main(['--help']); main(['pretrain', '--help']);"
        "sys.exit('torch' in sys.modules)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    for verb in VERBS:
        assert f"  {verb} " in found.stdout
    assert "--cohort.networks" in found.stdout


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_and_paths_in_documents_resolve(document):
    text = document.read_text()
    for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", text):
        if "://" not in target:
            assert (document.parent / target).exists(), target
    # In prose, a path of this repository stands in backquotes and has a slash and a known top folder.
    tops = {path.name for path in ROOT.iterdir()}
    for path in re.findall(r"`([\w./-]+/[\w./-]*)`", text):
        if path.split("/")[0] in tops - {"runs", "data"}:
            assert (ROOT / path).exists(), path


def test_readme_maps_every_module():
    text = (ROOT / "README.md").read_text()
    for package in PACKAGES:
        for file in (ROOT / package).glob("*.py"):
            if not file.name.startswith("__"):
                assert f"`{package}/{file.name}`" in text, file.name
