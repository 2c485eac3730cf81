"""What stands in the documents: their fenced blocks, the commands in them, links and headings.

The word behind a fence says what a block is, and `test_documents` checks it by that:

    bash             commands, one a line; the parsers of the program read each
    console          commands after `$ `, and what they printed
    text             output, or another text: not checked
    python           runs
    python NAME      needs NAME, which is not here: it is compiled
    yaml VERB        a config of the verb: the program reads it
    yaml detectron2  of another program: any YAML
"""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])

_FENCE = re.compile(r"^( *)(`{3,})(.*)$")
# Between two commands of a line, and where a file takes the output.
_BETWEEN = re.compile(r"[;|&]+")


class Block(NamedTuple):
    """A fenced block.

    Attributes:
        file: document that it stands in, below the repository.
        line: number of the line of its fence, from 1.
        kind: the words behind its fence.
        text: its lines, without the indentation of the fence.
    """

    file: str
    line: int
    kind: str
    text: str

    @property
    def place(self) -> str:
        """Where it stands, for messages."""
        return f"{self.file}:{self.line}"


def blocks_of(document: Path) -> list[Block]:
    """Every fenced block of a document."""
    found, lines = [], enumerate(document.read_text().splitlines(), 1)
    for number, line in lines:
        if opened := _FENCE.match(line):
            indent, fence, kind = opened.groups()
            inner = []
            for _, each in lines:
                if each.strip() == fence:
                    break
                inner.append(each.removeprefix(indent))
            else:
                raise AssertionError(f"{document}:{number}: the block has no end")
            name = document.relative_to(ROOT).as_posix()
            found.append(Block(name, number, kind.strip(), "\n".join(inner)))
    return found


def prose_of(document: Path) -> str:
    """A document without its fenced blocks."""
    kept, fence = [], ""
    for line in document.read_text().splitlines():
        opened = _FENCE.match(line)
        if opened and not fence:
            fence = opened[2]
        elif fence:
            fence = "" if line.strip() == fence else fence
        else:
            kept.append(line)
    return "\n".join(kept)


def commands_of(block: Block) -> Iterator[list[str]]:
    """The words of every command of a `bash` or `console` block, without variables that are set for it alone."""
    lines = block.text.splitlines()
    if block.kind == "console":
        lines = [line[2:] for line in lines if line.startswith("$ ")]
    text = ""
    for line in lines:
        text += line.removesuffix("\\")
        if line.endswith("\\") or not _is_whole(text):
            text += "" if line.endswith("\\") else "\n"
            continue
        yield from _commands(text)
        text = ""
    assert not text.strip(), f"{block.place}: {text} has no end"


def _is_whole(text: str) -> bool:
    try:
        _words(text)
    except ValueError:
        return False
    return True


def _words(text: str) -> list[str]:
    lexer = shlex.shlex(text, posix=True, punctuation_chars=";|&<>")
    lexer.whitespace_split = True
    return list(lexer)


def _commands(text: str) -> Iterator[list[str]]:
    command: list[str] = []
    for word in [*_words(text), ";"]:
        if not _BETWEEN.fullmatch(word):
            command.append(word)
            continue
        if ">" in command:
            command = command[: command.index(">")]
        # Of a loop, what it repeats.
        if command[:1] in (["for"], ["done"]):
            command = []
        while command and (command[0] == "do" or re.fullmatch(r"[A-Z_]+=.*", command[0])):
            command = command[1:]
        if command:
            yield [re.sub(r"\$\w+", "1", each) for each in command]
        command = []


def anchors_of(document: Path) -> set[str]:
    """The anchors that GitHub gives to the headings of a document."""
    anchors: set[str] = set()
    for heading in re.findall(r"^#+ +(.*)$", prose_of(document), re.MULTILINE):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()
        slug = re.sub(r"[^\w\- ]", "", plain).strip().replace(" ", "-")
        number = 0
        while (anchor := f"{slug}-{number}" if number else slug) in anchors:
            number += 1
        anchors.add(anchor)
    return anchors
