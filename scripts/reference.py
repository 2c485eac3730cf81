"""The pages below docs/reference, from the code: verbs, keys, metrics, events, files, exit codes, Python functions.

python scripts/reference.py     # writes them; they are the same on every machine
"""

import argparse
import importlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

from peerlearn import HOME
from peerlearn.cli import dispatch
from peerlearn.commands.verbs import VERBS
from peerlearn.config import ArgumentParser, changeable_keys, door
from peerlearn.config.fields import keys_of
from peerlearn.config.help import default_text
from peerlearn.config.values import expected
from peerlearn.errors import EXIT_CODES
from peerlearn.runs.event_guide import EVENTS
from peerlearn.runs.file_guide import FILES
from peerlearn.runs.metric_guide import FIELDS, FIGURES
from peerlearn.runs.score_names import ENSEMBLE, PIXELS, WEIGHTED_ENSEMBLE, score_name

FOLDER = HOME / "docs" / "reference"
_NOTE = "<!-- python scripts/reference.py writes this page: change the code, not the page. -->"

# The functions and classes that other programs may use.
PUBLIC = (
    "pretrain.losses.MCLTerms",
    "pretrain.losses.queue_terms",
    "pretrain.losses.batch_terms",
    "pretrain.losses.view_terms",
    "pretrain.distill.dml",
    "pretrain.distill.ensemble_teaching",
    "pretrain.distill.ensemble_weights",
    "pretrain.distill.one",
    "pretrain.distill.cl_ilr",
    "pretrain.distill.okddip",
    "pretrain.key_queue.KeyQueue",
    "peerlearn.backbones.create_backbone",
    "peerlearn.knn.knn_scores",
    "peerlearn.export.save_export",
    "peerlearn.export.load_export",
    "detection.voc.evaluate",
    "detection.voc.VOCResult",
    "fewshot.evaluate.evaluate_features",
    "fewshot.evaluate.FewShotResult",
)


class _Reached(BaseException):
    """The help of a verb was asked for."""

    def __init__(self, found: Any) -> None:
        self.found = found


class ConfigHelp(NamedTuple):
    """What `--help` tells of a verb with a config: the arguments of `help_text`."""

    config_class: Any
    command: str
    description: str
    example: str
    usage: str
    essential: Any


def help_of(*words: str) -> ConfigHelp | ArgumentParser:
    """What a verb prints its help from."""

    def config_help(*arguments: Any) -> str:
        raise _Reached(ConfigHelp(*arguments))

    def parser_help(parser: ArgumentParser) -> None:
        raise _Reached(parser)

    with ExitStack() as patched:
        patched.enter_context(patch.object(door, "help_text", config_help))
        patched.enter_context(patch.object(ArgumentParser, "print_help", parser_help))
        try:
            dispatch([*words, "--help"])
        except _Reached as reached:
            found: ConfigHelp | ArgumentParser = reached.found
            return found
    raise ValueError(f"peerlearn {' '.join(words)} prints no help of its own")


def pages() -> dict[str, str]:
    """Every page by its file's name."""
    made: dict[str, Callable[[], Iterator[str]]] = {
        "README.md": _index,
        "verbs.md": _verbs,
        "metrics.md": _metrics,
        "events.md": _events,
        "files.md": _files,
        "exit_codes.md": _exit_codes,
        "python.md": _python,
    }
    for words in _with_config():
        made[_page_of(words)] = lambda words=words: _keys(words)
    return {
        name: f"{_NOTE}\n\n" + "\n".join(lines()).strip() + "\n" for name, lines in made.items()
    }


def _all_helps() -> dict[tuple[str, ...], ConfigHelp | ArgumentParser]:
    """Every verb, and every action of a verb, with its help."""
    found: dict[tuple[str, ...], ConfigHelp | ArgumentParser] = {}
    for verb in VERBS:
        if verb == "resume":
            continue
        found[(verb,)] = help_of(verb)
    for words in (
        ("data", "show"),
        ("data", "verify"),
        ("data", "convert"),
        ("data", "build"),
        ("detect", "show"),
    ):
        found[words] = help_of(*words)
    return found


def _with_config() -> list[tuple[str, ...]]:
    verbs = [(verb,) for verb in VERBS if verb != "resume"]
    return [words for words in verbs if isinstance(help_of(*words), ConfigHelp)]


def _page_of(words: tuple[str, ...]) -> str:
    return f"keys_of_{'_'.join(words)}.md"


def _index() -> Iterator[str]:
    yield "# Reference"
    yield ""
    yield "These pages are made from the code. `python scripts/reference.py` writes them."
    yield ""
    yield "- [Verbs](verbs.md) of the command, with their arguments"
    for words in _with_config():
        yield f"- [Keys of `peerlearn {' '.join(words)}`]({_page_of(words)})"
    yield "- [Metrics](metrics.md): the fields of metrics.jsonl"
    yield "- [Events](events.md): the kinds of lines in events.jsonl"
    yield "- [Files](files.md) of a run directory"
    yield "- [Exit codes](exit_codes.md)"
    yield "- [Python functions](python.md)"


def _table(*columns: str) -> Iterator[str]:
    yield _row(*columns)
    yield "|" + "---|" * len(columns)


def _row(*cells: str) -> str:
    safe = (" ".join(cell.split()).replace("|", "\\|").replace("<", "&lt;") for cell in cells)
    return f"| {' | '.join(safe)} |"


def _verbs() -> Iterator[str]:
    yield "# Verbs"
    yield ""
    yield "`peerlearn VERB --help` prints the same. `--dry_run` checks a command and starts nothing."
    yield ""
    yield from _table("verb", "what it does", "`--dry_run`")
    for name, verb in VERBS.items():
        yield _row(f"`{name}`", verb.help, "yes" if verb.dry_run or name == "submit" else "")
    for words, found in _all_helps().items():
        name = " ".join(words)
        yield from ("", f"## {name}", "")
        if isinstance(found, ConfigHelp):
            yield from (found.description, "")
            yield from ("```bash", found.example, "```", "")
            page = _page_of(words if words in _with_config() else ("pretrain",))
            yield f"Usage: `{found.command} {found.usage}`. The keys: [{page.removesuffix('.md')}]({page})."
        else:
            yield from _arguments(found)
    yield from ("", "## resume", "", "Continue a run or a study from its newest whole save.", "")
    yield from ("```bash", "peerlearn resume runs/demo", "```", "")
    yield "`--allow_elastic` accepts another number of processes. Other keys may follow if they may change:"
    pretraining = help_of("pretrain")
    assert isinstance(pretraining, ConfigHelp)
    yield ", ".join(f"`{key}`" for key in changeable_keys(pretraining.config_class)) + "."


def _arguments(parser: ArgumentParser) -> Iterator[str]:
    yield " ".join((parser.description or "").split())
    rows = [action for action in parser._actions if not isinstance(action, argparse._HelpAction)]
    if rows:
        yield ""
        yield from _table("argument", "meaning")
    formatter = parser._get_formatter()
    for action in rows:
        name = ", ".join(action.option_strings) or str(action.metavar or action.dest)
        if isinstance(action, argparse._SubParsersAction):
            name = "ACTION"
        values = f" One of {', '.join(map(str, action.choices))}." if action.choices else ""
        meaning = formatter._expand_help(action) if action.help else ""
        yield _row(f"`{name}`", f"{meaning}.{values}".removeprefix(". ").removeprefix("."))


def _keys(words: tuple[str, ...]) -> Iterator[str]:
    found = help_of(*words)
    assert isinstance(found, ConfigHelp)
    yield f"# Keys of `{found.command}`"
    yield ""
    yield f"{found.description} [Verbs](verbs.md#{'-'.join(words)}) has an example."
    yield ""
    yield "A key stands in a YAML file, or on the command line as `--key value`."
    keys = [key for key in keys_of(found.config_class) if not key.is_group]
    may_change = {key.split(" ")[0] for key in changeable_keys(found.config_class)}
    if may_change:
        yield "A key marked * may change when a run is resumed."
    yield ""
    yield from _table("key", "type", "default", "meaning")
    for key in keys:
        group = key.name.rpartition(".")[0]
        mark = " *" if {key.name, f"{group}.*"} & may_change else ""
        default = "required" if key.required else default_text(key.default)
        yield _row(f"`{key.name}`{mark}", expected(key.hint), default, key.explained)


def _metrics() -> Iterator[str]:
    yield "# Metrics"
    yield ""
    yield "`metrics.jsonl` has one JSON object for each logged step. A field that was not finite is null."
    yield "Clocks, rates and `attempt` alone may differ between a run and its resumed twin."
    yield ""
    yield "## Fields of the whole row"
    yield ""
    yield from _table("field", "unit", "meaning")
    for name, meaning in FIELDS.items():
        yield _row(f"`{name}`", *meaning)
    yield ""
    yield "## Figures of networks"
    yield ""
    yield "A figure stands behind the name of what it is of:"
    yield ""
    yield from _table("name", "what the figure is of")
    for network, what in (
        ("M", "query network M: 0, 1, ..."),
        ("key-M", "the momentum network of M"),
        (ENSEMBLE, "all networks together"),
        (WEIGHTED_ENSEMBLE, "all networks by their weights"),
        (PIXELS, "the raw images, which a network has to beat"),
    ):
        yield _row(f"`{score_name(network, 'FIGURE')}`", what)
    yield ""
    yield from _table("figure", "unit", "meaning")
    for name, meaning in FIGURES.items():
        yield _row(f"`{name}`", *meaning)


def _events() -> Iterator[str]:
    yield "# Events"
    yield ""
    yield "`events.jsonl` has one JSON object for each event. Each has `time` (UTC) and `event`, its kind."
    yield ""
    yield from _table("event", "when", "facts")
    for name, (when, facts) in EVENTS.items():
        yield _row(
            f"`{name}`", when, "; ".join(f"`{fact}`: {text}" for fact, text in facts.items())
        )


def _files() -> Iterator[str]:
    yield "# Files of a run"
    yield ""
    yield "N is a step of eight digits, K the number of a start, R a rank, M a network, NAME any name."
    yield "`net-M-key` is the momentum network of `net-M`."
    yield ""
    yield from _table("file", "content")
    for path, meaning in FILES.items():
        yield _row(f"`{path}`", meaning)


def _exit_codes() -> Iterator[str]:
    yield "# Exit codes"
    yield ""
    yield from _table("code", "meaning")
    for code, meaning in EXIT_CODES.items():
        yield _row(str(code), meaning)


def _python() -> Iterator[str]:
    yield "# Python functions"
    yield ""
    yield "Dimensions: M networks, B batch, K queue, D embedding, C classes."
    modules: dict[str, list[str]] = {}
    for name in PUBLIC:
        module, _, function = name.rpartition(".")
        modules.setdefault(module, []).append(function)
    for module, names in modules.items():
        yield from ("", f"## {module}")
        for name in names:
            documented = getattr(importlib.import_module(module), name)
            yield from ("", f"### {name}", "", "```text")
            yield f"{name}{_signature(documented)}"
            yield from ("", inspect.getdoc(documented) or "", "```")


def _signature(documented: Any) -> str:
    """One parameter a line."""
    parameters: Mapping[str, inspect.Parameter] = inspect.signature(documented).parameters
    lines, keyword_only = [], False
    for parameter in parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY and not keyword_only:
            keyword_only = True
            lines.append("    *,")
        hint = parameter.annotation
        shown = hint if isinstance(hint, str) else getattr(hint, "__name__", None)
        text = str(hint) if shown is None or "[" in str(hint) or "|" in str(hint) else shown
        value = "" if parameter.default is parameter.empty else f" = {parameter.default!r}"
        lines.append(f"    {parameter.name}: {text}{value},")
    return "\n".join(["(", *lines, ")"])


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    written: Mapping[str, str] = pages()
    for path in FOLDER.glob("*.md"):
        if path.name not in written:
            path.unlink()
    for name, text in written.items():
        Path(FOLDER / name).write_text(text)


if __name__ == "__main__":
    main()
