"""The picture of a confusion matrix: what is drawn, and that its names have room, for any number of classes."""

import re
import string
import tempfile
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from peerlearn.evaluation.confusion import block_shares, confused_pairs, plot_confusion
from peerlearn.evaluation.plots import COLUMN_INCHES, DOTS_PER_INCH, PAGE_INCHES
from tests.drawn import check_texts, figure_of


def picture(confusion: torch.Tensor, names: list[str] | None = None, title: str = "t") -> partial:
    names = names or [f"class {number}" for number in range(len(confusion))]
    return partial(plot_confusion, confusion=confusion, class_names=names, title=title)


def test_shares_are_numbers_in_the_cells_and_an_empty_class_is_grey(tmp_path):
    confusion = torch.tensor([[3, 1, 0], [0, 0, 0], [0, 2, 998]])
    figure = figure_of(picture(confusion, ["cat", "dog", "$x$"]), tmp_path / "a.png")
    axes = figure.axes[0]
    cells = {text.get_position(): text.get_text() for text in axes.texts}
    # The 0.2 % of the last row are a colour and no number.
    assert cells == {(0, 0): "75", (1, 0): "25", (2, 2): "100"}
    image = axes.images[0].get_array()
    assert image.mask.tolist() == [[False] * 3, [True] * 3, [False] * 3]
    assert image[2].tolist() == pytest.approx([-1, 0.2, 99.8])
    assert axes.images[0].get_clim() == (0, 100)
    assert [label.get_text() for label in axes.get_yticklabels()] == ["cat", "dog", "$x$"]
    assert axes.get_ylabel() == "true class; grey: no images"
    assert figure.axes[1].get_ylabel() == "share of the true class (%)"


@pytest.mark.parametrize(
    ("classes", "inches"),
    [(1, COLUMN_INCHES), (10, COLUMN_INCHES), (11, PAGE_INCHES), (30, PAGE_INCHES)],
)
def test_few_classes_have_a_column_and_more_a_page(classes, inches, tmp_path):
    long = [f"a name that is long {number}" for number in range(classes)]
    draws = picture(torch.eye(classes, dtype=torch.int64) * 1000, long, title="W" * 150)
    check_texts(figure_of(draws, tmp_path / "a.png"))
    with Image.open(tmp_path / "a.png") as image:
        assert image.width == round(inches * DOTS_PER_INCH)
        assert image.info["dpi"] == pytest.approx((DOTS_PER_INCH, DOTS_PER_INCH), abs=0.1)


@settings(max_examples=2, deadline=None)
@given(
    names=st.lists(
        st.text(
            st.characters(codec="utf-8") | st.sampled_from(string.ascii_uppercase), max_size=60
        ),
        min_size=2,
        max_size=30,
    ),
    title=st.text(string.printable, max_size=150),
)
def test_names_of_any_kind_do_not_meet_and_stay_inside(names, title):
    confusion = torch.full((len(names), len(names)), 3)
    with tempfile.TemporaryDirectory() as folder:
        check_texts(figure_of(picture(confusion, names, title), Path(folder) / "a.png"))


def test_a_thousand_classes_are_blocks_and_a_list_of_pairs(tmp_path):
    confusion = 50 * torch.eye(1000, dtype=torch.int64)
    confusion[7, 7], confusion[7, 999] = 30, 20
    confusion[3, 3], confusion[3, 4] = 49, 1
    names = [f"W{'m' * 40}{number}" for number in range(1000)]
    figure = figure_of(picture(confusion, names), tmp_path / "a.png")
    check_texts(figure)
    matrix, pairs = figure.axes[:2]
    image = matrix.images[0]
    assert image.get_array().shape == (100, 100)
    assert image.norm(100.0) == 1
    # 20 of 500 images of the first ten classes; the rest of the matrix is below the scale.
    assert float(image.get_array()[0, 99]) == pytest.approx(4)
    assert float(image.get_array()[5, 4]) < image.get_clim()[0]
    assert matrix.get_xlabel() == "predicted class (number, 10 in a block)"
    assert [text.get_text() for text in pairs.texts] == ["20 of 50", "1 of 50"]
    assert [bar.get_width() for bar in pairs.patches] == [20, 1]
    first = pairs.get_yticklabels()[0].get_text()
    assert re.fullmatch(r"Wm+\.\.\.m*7\n→ Wm+\.\.\.m*999", first)
    with Image.open(tmp_path / "a.png") as drawn:
        assert drawn.width == round(PAGE_INCHES * DOTS_PER_INCH)


def test_a_hundred_classes_of_a_perfect_network_have_no_pairs(tmp_path):
    figure = figure_of(picture(torch.eye(100, dtype=torch.int64)), tmp_path / "a.png")
    check_texts(figure)
    assert figure.axes[0].images[0].get_array().shape == (100, 100)
    assert [text.get_text() for text in figure.axes[1].texts] == ["none"]


def test_pairs_are_ranked_by_images_and_equals_by_their_place():
    confusion = torch.tensor([[9, 2, 2], [5, 0, 0], [0, 1, 9]])
    found = [tuple(pair) for pair in confused_pairs(confusion, 3)]
    assert found == [(1, 0, 5, 5), (0, 1, 2, 13), (0, 2, 2, 13)]
    assert len(confused_pairs(confusion, 9)) == 4
    assert confusion.diagonal().tolist() == [9, 0, 9]


def test_blocks_are_means_over_the_classes_that_have_images():
    confusion = torch.tensor([[1, 1, 2], [0, 0, 0], [0, 0, 0]])
    shares = block_shares(confusion, most=2)
    assert shares[0].tolist() == [50, 50]
    assert shares[1].isnan().all()
    whole = block_shares(confusion, most=3)
    assert whole[0].tolist() == [25, 25, 50]
