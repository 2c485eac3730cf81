"""Model cards: README.md of a network as the Hugging Face Hub reads it, a head in YAML and then Markdown.

`huggingface_hub.ModelCard.load` reads the head. It joins the figures that are of one task, data set and split, and
keeps the names of the first of them: what differs between them must stand in the figure's own name and arguments.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import yaml

from peerlearn.errors import UserError
from peerlearn.runs.text import file_name_part, markdown_cell, printable

MODEL_INDEX = "model-index"
ORIGIN_TABLE = "| origin | |\n|---|---|\n"
_EVALUATED = "\n## Measured by evaluators\n"


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One measured figure of a network.

    Attributes:
        name: name of the figure for people.
        metric: name of the figure for programs, such as accuracy.
        value: value of the figure.
        dataset: title of the data set.
        split: split of the data set that is asked.
        task: name of the task on the Hub.
        protocol: all that the figure depends on beside the network: plain values by name.
    """

    name: str
    metric: str
    value: float
    dataset: str
    split: str
    task: str = "image-classification"
    protocol: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class CardFacts:
    """What a card tells of a network that its weights do not show.

    Attributes:
        tags: words to find the network by.
        datasets: names on the Hub of the data sets that it was trained on.
        recipe: how it was trained, in Markdown; "" = unknown.
        figures: what training has measured of it.
        licence: licence of the training images, in Markdown.
    """

    tags: Sequence[str] = ()
    datasets: Sequence[str] = ()
    recipe: str = ""
    figures: Sequence[Figure] = ()
    licence: str = "unknown: ask who trained the network"


def card_head(entries: Mapping[str, Any]) -> str:
    """The head of a card; entries without a value are left out."""
    plain = {key: value for key, value in entries.items() if value}
    # Lines are never broken: a part of a text could look like the head's end.
    text = yaml.safe_dump(plain, sort_keys=False, allow_unicode=True, width=math.inf)
    return f"---\n{text}---\n"


def split_card(text: str) -> tuple[dict[str, Any], str]:
    """The entries of a card's head, and the Markdown after it; no entries where the head cannot be read."""
    found = re.match(r"---\n(.*?\n)---\n", text, re.DOTALL)
    if found is None:
        return {}, text
    try:
        entries = yaml.safe_load(found[1])
    except yaml.YAMLError:
        entries = {}
    return entries if isinstance(entries, dict) else {}, text[found.end() :]


def model_index(name: str, figures: Sequence[Figure]) -> list[dict[str, Any]]:
    """The figures as the Hub has them in a card's head; empty without figures, as the Hub takes no empty one."""
    groups: dict[tuple[str, str, str], dict[str, Any]] = {}
    for figure in figures:
        group = groups.setdefault(
            (figure.task, figure.dataset, figure.split),
            {"task": {"type": figure.task}, "dataset": _dataset_entry(figure), "metrics": []},
        )
        metric = {
            "type": figure.metric,
            "value": figure.value,
            "name": printable(figure.name),
            "args": _plain(figure.protocol),
        }
        group["metrics"].append({key: value for key, value in metric.items() if value != {}})
    return [{"name": printable(name), "results": list(groups.values())}] if groups else []


def figure_table(figures: Sequence[Figure]) -> str:
    """The figures as a table in Markdown, with their protocols."""
    rows = [
        (
            f"{figure.dataset}, {figure.split}",
            figure.name,
            f"{figure.value:.6g}",
            ", ".join(f"{key} {value}" for key, value in figure.protocol.items()),
        )
        for figure in figures
    ]
    head = "| images | figure | value | protocol |\n|---|---|---|---|\n"
    return head + "".join(f"| {' | '.join(map(markdown_cell, row))} |\n" for row in rows)


def with_figures(card: str, figures: Sequence[Figure]) -> str:
    """The card with a section of what evaluators have measured, in its head and at its end.

    Args:
        card: text of a card that has none of these figures in its head.
        figures: figures to add; none leave the card as it is.

    Raises:
        UserError: the card, which another program wrote, has figures that cannot be read.
    """
    if not figures:
        return card
    entries, body = split_card(card)
    earlier = entries.pop(MODEL_INDEX, [])
    title = re.search(r"^# (.*)$", body, re.MULTILINE)
    added = model_index(title[1] if title else "network", figures)
    if earlier:
        try:
            added = [{**earlier[0], "results": earlier[0]["results"] + added[0]["results"]}]
        except (LookupError, TypeError) as error:
            raise UserError(
                f"the model card has a {MODEL_INDEX} that is none: remove it"
            ) from error
    return (
        f"{card_head({**entries, MODEL_INDEX: added})}{body}{_EVALUATED}\n{figure_table(figures)}"
    )


def fenced(text: str, language: str) -> str:
    """A block of code that nothing in the text ends early."""
    longest = max(map(len, re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text.rstrip()}\n{fence}\n"


def _dataset_entry(figure: Figure) -> dict[str, str]:
    """The Hub's entry of a data set. Its type is a name without blanks; titles that lose by that are told as config."""
    title = printable(figure.dataset)
    kind = file_name_part(title)
    return {
        "type": kind,
        "name": title,
        **({} if kind == title else {"config": title}),
        "split": figure.split,
    }


def _plain(protocol: Mapping[str, Any]) -> dict[str, Any]:
    return {
        printable(key): printable(value) if isinstance(value, str) else value
        for key, value in protocol.items()
    }
