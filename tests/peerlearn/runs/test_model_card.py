"""Model cards as the Hugging Face Hub's own library reads them, whatever the names in them."""

import re

import pytest
import yaml
from huggingface_hub import ModelCard, ModelCardData
from hypothesis import given
from hypothesis import strategies as st

from peerlearn.errors import UserError
from peerlearn.runs.model_card import (
    MODEL_INDEX,
    Figure,
    card_head,
    fenced,
    figure_table,
    model_index,
    split_card,
    with_figures,
)

HOSTILE = [
    "cats\n---\nlicense: mit\n---\n# other",
    "a: b # c",
    "{{ x }} [y](http://z) <img src=x onerror=y>",
    "'\"`|*_!&%@-?:",
    "- one\r\n- two\u2028three\x85four",
    "\udcfc.pth",
    "yes",
    "1e3",
    "",
    "~",
    "  blank  ",
    "日本語 \U0001f408",
]


def card_of(title: str, *figures: Figure) -> str:
    head = card_head({"library_name": "timm", "tags": [], MODEL_INDEX: model_index(title, figures)})
    return f"{head}# title\n\ntext\n"


def figure(value: float = 62.3, **changes) -> Figure:
    return Figure(
        **{
            "name": "top-1",
            "metric": "accuracy",
            "value": value,
            "dataset": "cifar100",
            "split": "test",
            "protocol": {"k": 200, "temperature": 0.1},
        }
        | changes
    )


def round_trip(text: str) -> ModelCard:
    """The card as the library writes it after it has read it, read again."""
    card = ModelCard(text)
    again = ModelCard(f"---\n{ModelCardData(**yaml.safe_load(card.data.to_yaml()))}\n---\n")
    assert again.data.eval_results == card.data.eval_results
    assert again.data.model_name == card.data.model_name
    return card


@pytest.mark.parametrize("name", HOSTILE)
def test_no_name_breaks_the_head_or_a_table(name):
    given_figure = figure(name=name, dataset=name, protocol={name: name})
    text = card_of(name, given_figure)
    card = round_trip(text)
    assert card.data.library_name == "timm"
    assert card.data.license is None
    assert card.text == "# title\n\ntext\n"
    (found,) = card.data.eval_results
    assert found.metric_value == 62.3
    # The bytes of a file's name that are no UTF-8 could not be written.
    for text in (card.data.model_name, found.metric_name, found.dataset_name, *found.metric_args):
        assert text.isprintable()
    assert re.fullmatch(r"[\w.+-]*", found.dataset_type, re.ASCII)
    if name.isprintable():
        assert (card.data.model_name, found.metric_name) == (name, name)
        assert (found.dataset_name, found.metric_args) == (name, {name: name})
    lines = figure_table([given_figure]).splitlines()
    assert len(lines) == 3
    assert len(re.findall(r"(?<!\\)\|", lines[2])) == 5
    assert not re.search(r"(?<!\\)<\w|(?<!\\)`", lines[2])


@given(st.text(), st.floats(allow_nan=False, allow_infinity=False))
def test_any_text_and_any_value_come_back(name, value):
    (found,) = round_trip(card_of(name, figure(value, dataset=name))).data.eval_results
    assert found.metric_value == value


def test_figures_that_the_library_joins_keep_their_protocols():
    """It joins those of one task, data set and split, and keeps the first one's names of these."""
    first = figure(1.0)
    second = figure(2.0, name="linear", protocol={"k": 5})
    third = figure(3.0, dataset="a b", split="validation")
    fourth = figure(4.0, dataset="a_b", split="validation")
    card = round_trip(card_of("net", first, third, second, fourth))
    found = {each.metric_value: each for each in card.data.eval_results}
    assert [found[n].metric_args for n in (1.0, 2.0)] == [first.protocol, second.protocol]
    assert [found[n].metric_name for n in (1.0, 2.0)] == ["top-1", "linear"]
    assert [found[n].dataset_name for n in (1.0, 2.0)] == ["cifar100", "cifar100"]
    # One type, two data sets: the library would join them but for the config.
    assert [found[n].dataset_type for n in (3.0, 4.0)] == ["a_b", "a_b"]
    assert [found[n].dataset_name for n in (3.0, 4.0)] == ["a b", "a_b"]


def test_figures_are_added_to_those_of_the_card():
    card = with_figures(card_of("net", figure(1.0)), [figure(2.0), figure(3.0, split="train")])
    read = round_trip(card)
    assert [each.metric_value for each in read.data.eval_results] == [1.0, 2.0, 3.0]
    assert read.data.model_name == "net"
    assert card.endswith(figure_table([figure(2.0), figure(3.0, split="train")]))
    assert with_figures(card, []) == card


@pytest.mark.parametrize(
    "card", ["", "no head\n", "---\n: : [\n---\nbroken\n", "---\n- 1\n---\nlist\n"]
)
def test_cards_of_other_programs_take_figures_too(card):
    text = with_figures(card, [figure()])
    assert [each.metric_value for each in ModelCard(text).data.eval_results] == [62.3]
    assert split_card(card)[1] in text
    with pytest.raises(UserError, match="model-index"):
        with_figures(f"---\n{MODEL_INDEX}: 3\n---\n", [figure()])


def test_nothing_ends_a_block_of_code_early():
    text = "a: |-\n  ```\n  ````\n"
    block = fenced(text, "yaml")
    assert block == f"`````yaml\n{text}`````\n"
    assert fenced("a: 1\n", "yaml") == "```yaml\na: 1\n```\n"
