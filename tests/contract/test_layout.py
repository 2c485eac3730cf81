"""What holds the house together: who imports whom, and what ships."""

import ast
import re
import subprocess
import sys
import tomllib
from functools import cache
from graphlib import TopologicalSorter
from itertools import combinations
from pathlib import Path

import pytest

from peerlearn import PACKAGES
from peerlearn.cli import check_siblings
from peerlearn.commands.verbs import VERBS
from peerlearn.errors import UserError

ROOT = Path(__file__).parents[2]


# What stands on what: a file imports from its own room and from rungs above its line.
LADDER = (
    ("peerlearn.errors",),
    ("peerlearn.config", "peerlearn.counter_random"),
    ("peerlearn.networks",),
    ("peerlearn.backbones",),
    ("peerlearn.runs",),
    ("peerlearn.compute",),
    ("peerlearn.data",),
    ("peerlearn.export", "peerlearn.knn"),
    ("peerlearn.exchange", "peerlearn.commands", "peerlearn.evaluation"),
    ("peerlearn.report",),
    ("peerlearn.cli",),
    ("pretrain", "linear_eval", "fewshot", "detection", "slurm"),
    ("studies",),
)
RUNG = {room: rung for rung, rooms in enumerate(LADDER) for room in rooms}
# These two hold the names of packages and start the command; `import peerlearn` itself is open to all.
ENDS = ("peerlearn/__init__.py", "peerlearn/__main__.py")


def source_files() -> dict[str, str]:
    """The text of every source file by its path."""
    files = [file for package in PACKAGES for file in sorted((ROOT / package).rglob("*.py"))]
    return {file.relative_to(ROOT).as_posix(): file.read_text() for file in files}


def module_name(file: str) -> str:
    return ".".join(Path(file).with_suffix("").parts).removesuffix(".__init__")


def room_of(module: str) -> str:
    """The room that a module of ours lies in: a package, or a file at the top of `peerlearn`."""
    parts = module.split(".")
    return ".".join(parts[: 2 if parts[0] == "peerlearn" else 1])


@cache
def import_lines(text: str) -> list[ast.Import | ast.ImportFrom]:
    """The imports anywhere in a file, inside functions and for types too. Most tests read the same files."""
    return [n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.Import | ast.ImportFrom)]


def imports_of(text: str, modules: set[str]) -> set[str]:
    """The modules of ours that a file imports."""
    found = set()
    for node in import_lines(text):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        else:
            assert node.level == 0, f"a relative import: {ast.unparse(node)}"
            # A name of a package may be a module of its own.
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in modules else str(node.module) for name in names}
    return found & modules


def import_graph(files: dict[str, str]) -> dict[str, set[str]]:
    texts = {module_name(file): text for file, text in files.items()}
    return {name: imports_of(text, set(texts)) - {name} for name, text in texts.items()}


def against_the_ladder(graph: dict[str, set[str]]) -> list[str]:
    """Every import of a room that is not below the importing one."""
    ends = set(map(module_name, ENDS))
    return [
        f"{name} imports {imported}"
        for name in graph.keys() - ends
        for imported in graph[name] - {"peerlearn"}
        if room_of(name) != room_of(imported) and RUNG[room_of(imported)] >= RUNG[room_of(name)]
    ]


def test_every_import_goes_down_the_ladder():
    graph = import_graph(source_files())
    assert len(graph) > 100
    assert sum(map(len, graph.values())) > 300
    assert {room_of(name) for name in graph} - {"peerlearn", "peerlearn.__main__"} == set(RUNG)
    assert not against_the_ladder(graph)


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("peerlearn/data/augment.py", "from peerlearn.evaluation.features import eval_mode"),
        ("peerlearn/errors.py", "import peerlearn.config"),
        ("peerlearn/runs/stop.py", "def late() -> None:\n    from peerlearn import export"),
        ("peerlearn/evaluation/plots.py", "import peerlearn.commands.doctor"),
        ("linear_eval/heads.py", "import pretrain.losses"),
        ("pretrain/losses.py", "from slurm.client import call"),
        ("slurm/client.py", "from studies import ledger"),
    ],
)
def test_an_import_turned_round_is_found(file, line):
    files = source_files()
    files[file] += f"\n{line}\n"
    (found,) = against_the_ladder(import_graph(files))
    assert found.startswith(f"{module_name(file)} imports ")


def test_no_imports_form_a_circle():
    graph = import_graph(source_files())
    # `import peerlearn` alone brings no module along: its hook waits until timm is imported.
    graph["peerlearn"] = set()
    TopologicalSorter(graph).prepare()


def test_few_files_lie_at_the_top_of_peerlearn():
    assert len(list((ROOT / "peerlearn").glob("*.py"))) <= 12


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
        "main(['linear', '--help']);"
        "sys.exit('torch' in sys.modules)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    for verb in VERBS:
        assert f"  {verb} " in found.stdout
    assert "--cohort.networks" in found.stdout
    assert "--penalties_c" in found.stdout


def test_the_map_names_every_room_in_the_order_of_the_ladder():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    order = [room for rooms in LADDER for room in rooms]
    places = [room.replace(".", "/") for room in order]
    names = [f"`{place}/`" if (ROOT / place).is_dir() else f"`{place}.py`" for place in places]
    rows = [
        next(n for n, line in enumerate(text.splitlines()) if line.startswith("|") and name in line)
        for name in names
    ]
    for (one, above), (other, below) in combinations(zip(order, rows, strict=True), 2):
        assert above <= below or RUNG[one] == RUNG[other], (one, other)
