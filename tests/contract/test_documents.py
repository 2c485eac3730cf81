"""The documents say what is true: their blocks run or are read by the program, their links and paths lead somewhere."""

import contextlib
import importlib
import io
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from peerlearn.cli import dispatch
from peerlearn.commands.configs_command import config_folders
from peerlearn.commands.verbs import FORMER_VERBS, VERBS
from peerlearn.config import ArgumentParser, door, load_config
from peerlearn.errors import UserError
from pretrain.config import PretrainConfig
from slurm.config import SubmitConfig
from studies.study import plan_study
from studies.study_command import resume as resume_study
from studies.study_file import read_study
from tests.contract.documents import (
    DOCUMENTS,
    ROOT,
    Block,
    anchors_of,
    blocks_of,
    commands_of,
    prose_of,
)

BLOCKS = [block for document in DOCUMENTS for block in blocks_of(document)]
# Programs that are not ours: what they do is theirs.
OTHERS = {".", "chmod", "mkdir", "pip", "rm", "ssh", "sudo", "tensorboard", "tail", "time", "wandb"}
# What a `python NAME` block needs, and no test has.
NEEDED = {"detectron2", "detector", "run", "tutorial"}
LONGEST_CODE = 3
# Images of the tutorial's runs in its test.
FEWER = [
    *("--data.limit", "200", "--epochs", "1", "--device", "cpu", "--queue.size", "64"),
    *("--monitor.train_limit", "100", "--monitor.test_limit", "50"),
]


def of_kind(*kinds: str) -> list[Any]:
    found = [block for block in BLOCKS if block.kind in kinds]
    return [pytest.param(block, id=block.place) for block in found]


class Parsed(BaseException):
    """A command line was read to its end."""

    def __init__(self, found: Any) -> None:
        self.found = found


@pytest.fixture
def parse(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[list[str]], Any]:
    """Read the words of `peerlearn` by the verb's own parser, and do nothing else with them."""
    build, read = door._build, ArgumentParser.parse_args

    def stop_at_config(*words: Any) -> None:
        raise Parsed(build(*words))

    def stop_at_arguments(parser: ArgumentParser, *words: Any) -> None:
        raise Parsed(read(parser, *words))

    monkeypatch.setattr(door, "_build", stop_at_config)
    monkeypatch.setattr(ArgumentParser, "parse_args", stop_at_arguments)
    monkeypatch.chdir(tmp_path)
    (profile,) = (block for block in BLOCKS if block.kind == "yaml submit")
    Path("my_cluster.yaml").write_text(profile.text)
    Path("my_cluster.yaml").chmod(0o600)

    def parsed(words: list[str]) -> Any:
        try:
            with contextlib.redirect_stdout(io.StringIO()) as said:
                code = dispatch(words)
        except Parsed as reached:
            return reached.found
        assert {"-h", "--help", "--version"} & {*words}, f"{words} was not read"
        return said.getvalue() and code

    return parsed


def check_peerlearn(words: list[str], parse: Callable[[list[str]], Any]) -> None:
    """Make sure that the program takes the words, and the lines within them.

    Raises:
        UserError: a verb, a key, a config or a value is none.
    """
    verb, *rest = words
    assert verb in VERBS or verb.startswith("-"), f"no verb {verb}"
    if verb == "submit" and "--" in rest:
        dashes = rest.index("--")
        parse([verb, *rest[: dashes + 2]])
        check_peerlearn(rest[dashes + 1 :], parse)
        return
    if verb == "resume":
        check_resume(rest, parse)
        return
    words = [word for word in words if word != "--auto_resume"]
    found = parse(words)
    if verb in ("study", "watch") and not isinstance(found, int):
        for line in found.evaluate:
            check_peerlearn([*shlex.split(line), "--checkpoint", "runs/a"], parse)
        if getattr(found, "pretrain", None):
            check_peerlearn(["pretrain", *shlex.split(found.pretrain)], parse)
    named = {"study": "file", "table": "study", "configs": "name"}.get(verb)
    name = getattr(found, named, None) if named else None
    if name and "/" not in name and not name.endswith(".yaml"):
        shipped = {
            file.stem for folder in config_folders().values() for file in folder.glob("*.yaml")
        }
        assert name in shipped, f"{name} is no shipped config"


def check_resume(words: list[str], parse: Callable[[list[str]], Any]) -> None:
    """The words after a run, or those after a study."""
    kept = [word for word in words[1:] if word not in ("--allow_elastic", "--dry_run")]
    if not kept:
        return
    try:
        parse(["pretrain", *kept])
    except UserError:
        with pytest.raises(Parsed):
            resume_study(words)


def check_command(words: list[str], parse: Callable[[list[str]], Any]) -> None:
    """Make sure that a command exists as it is written."""
    program, *rest = words
    if program in ("torchrun", "accelerate"):
        program, rest = "peerlearn", rest[rest.index("peerlearn") + 1 :]
    if program == "peerlearn":
        check_peerlearn(rest, parse)
    elif program in ("python", "pytest", "sh", "make"):
        CHECKS[program](rest)
    else:
        assert program in OTHERS, f"unknown program {program}"


def check_python(words: list[str]) -> None:
    if words[0] == "-c":
        code = words[1].strip()
        assert code.count("\n") < LONGEST_CODE, "so long a code belongs into a script"
        compile(code, "-c", "exec")
        return
    if words[0] == "-m":
        module, *rest = words[1:]
        if module == "peerlearn":
            return
        script = ROOT / (module.replace(".", "/") + ".py")
    else:
        script, rest = ROOT / words[0], words[1:]
    source = script.read_text()
    if "from peerlearn.cli import main" in source:
        # Its words are those of the command, with names that it alone knows.
        return
    for word in rest:
        if word.startswith("--"):
            assert f'"{word.split("=")[0]}"' in source, f"{script.name} knows no {word}"


def check_pytest(words: list[str]) -> None:
    for word in words:
        if "/" in word:
            assert (ROOT / word.split("::")[0]).exists(), word


def check_sh(words: list[str]) -> None:
    assert (ROOT / words[0]).is_file(), words[0]


def check_make(words: list[str]) -> None:
    rules = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert {word for word in words if "=" not in word} <= {*rules}


CHECKS = {"python": check_python, "pytest": check_pytest, "sh": check_sh, "make": check_make}


def test_every_block_says_what_it_is():
    assert len(BLOCKS) > 60
    known = {"bash", "console", "text", "python", "yaml detectron2"}
    known |= {f"python {name}" for name in NEEDED} | {f"yaml {verb}" for verb in VERBS}
    assert [block.place for block in BLOCKS if block.kind not in known] == []


@pytest.mark.parametrize("block", of_kind("bash", "console"))
def test_every_command_is_one_that_the_program_takes(block: Block, parse):
    commands = list(commands_of(block))
    assert commands
    for words in commands:
        try:
            check_command(words, parse)
        except (UserError, AssertionError, OSError) as error:
            raise AssertionError(f"{block.place}: {shlex.join(words)}: {error}") from error


@pytest.mark.parametrize(
    ("command", "complaint"),
    [
        ("peerlearn pretrian mcl_fashion_mnist_demo", "no verb pretrian"),
        ("peerlearn pretrain mcl_fashion_mnist_dome", "neither a file nor a shipped config"),
        ("peerlearn pretrain mcl_fashion_mnist_demo --epoch 2", "unknown key --epoch"),
        ("peerlearn knn --checkpoint runs/a --k ten", "expected"),
        ("peerlearn export runs/a --format onnx", "invalid choice"),
        ("peerlearn submit --cluster local -- knn --checkpoint runs/a --q 1", "unknown key --q"),
        ("peerlearn watch runs/a --evaluate 'knn --q 1'", "unknown key --q"),
        ("peerlearn study table_9_digits", "no shipped config"),
        ("peerlearn resume runs/a --epoch 2", "unrecognized arguments: --epoch"),
        ("for s in 1 2; do peerlearn knn --checkpoint a$s --q 1; done", "unknown key --q"),
        ("X=1 torchrun -m -- peerlearn linear moco_liner --checkpoint a", "neither a file nor"),
        ("python benchmarks/knn.py --turns 3", "knows no --turns"),
        ("python -m benchmarks.nothing", "nothing.py"),
        ("pytest tests/nothing.py", "tests/nothing.py"),
        ("make dance", ""),
        ("curl example.org", "unknown program curl"),
        ("python -c '1\n2\n3\n4'", "belongs into a script"),
    ],
)
def test_a_wrong_command_is_found(command: str, complaint: str, parse):
    (words,) = commands_of(Block("a.md", 1, "bash", command))
    with pytest.raises((UserError, AssertionError, OSError), match=re.escape(complaint)):
        check_command(words, parse)


@pytest.mark.parametrize("block", of_kind("console"))
def test_a_console_has_output_and_its_commands_begin_with_a_dollar(block: Block):
    assert block.text.startswith("$ ")
    assert any(not line.startswith("$ ") for line in block.text.splitlines())


@pytest.mark.parametrize("block", of_kind(*(f"yaml {name}" for name in [*VERBS, "detectron2"])))
def test_every_config_is_read(block: Block, tmp_path: Path):
    path = tmp_path / "config.yaml"
    path.write_text(block.text)
    match block.kind.split()[1]:
        case "submit":
            assert load_config(SubmitConfig, path) != SubmitConfig()
        case "pretrain":
            assert load_config(PretrainConfig, path) != PretrainConfig()
        case "study":
            assert plan_study(read_study(path), []).cells
        case "detectron2":
            assert yaml.safe_load(block.text)
        case verb:
            raise AssertionError(f"no test reads a config of {verb}")


@pytest.mark.parametrize("block", of_kind("python"))
def test_every_code_runs(block: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    exec(compile(block.text, block.place, "exec"), {"__name__": "__main__"})


@pytest.mark.slow(50)
def test_the_tutorial_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    """Every command of it in its order, on fewer images, and the code at its end."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    blocks = blocks_of(ROOT / "docs/tutorial.md")
    verbs = []
    for block in blocks:
        if block.kind == "python tutorial":
            exec(compile(block.text, block.place, "exec"), {})
        for program, *words in commands_of(block) if block.kind == "bash" else ():
            if program != "peerlearn" or words == ["doctor"]:
                continue
            verbs.append(words[0])
            fewer = FEWER if words[0] == "pretrain" else []
            assert dispatch([*words, *fewer]) == 0, words
    capsys.readouterr()
    assert verbs == [
        *("pretrain", "pretrain", "resume", "knn", "linear", "note", "runs", "report", "export"),
    ]
    assert Path("report.html").stat().st_size > 10_000
    assert Path("runs/pair/DONE").exists()


@pytest.mark.parametrize("block", of_kind(*(f"python {name}" for name in NEEDED)))
def test_code_that_needs_something_else_is_python(block: Block):
    compile(block.text, block.place, "exec")
    for module in re.findall(r"^(?:from|import) (\w+)", block.text, re.MULTILINE):
        if module not in NEEDED:
            importlib.import_module(module)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_anchors_and_paths_lead_somewhere(document: Path):
    text = prose_of(document)
    for target, anchor in re.findall(r"\]\(([^)#\s]*)(?:#([^)]*))?\)", text):
        if "://" in target:
            continue
        linked = document.parent / target if target else document
        assert linked.exists(), target
        if anchor:
            assert anchor in anchors_of(linked), f"{target}#{anchor}"
    # In prose, a path of this repository stands in backquotes and has a slash and a known top folder.
    tops = {path.name for path in ROOT.iterdir()}
    for path in re.findall(r"`([\w./-]+/[\w./-]*)`", text):
        if path.split("/")[0] in tops - {"runs", "data"}:
            assert (ROOT / path).exists(), path


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_a_verb_in_a_sentence_is_one(document: Path):
    if document.name == "CHANGELOG.md":
        return
    named = re.findall(r"`peerlearn ([a-z]+)[^`]*`", prose_of(document))
    assert {*named} <= VERBS.keys() | FORMER_VERBS.keys()
