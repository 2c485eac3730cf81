"""Pictures and tables of a detector: what is on them is asked of the figure, not of its pixels."""

import math
from functools import partial

import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from detection.class_table import show_classes
from detection.pictures import _LOOKS, _OBJECT, _label_corner, draw_sheet, plot_precision_recall
from detection.voc import RIGHT, WRONG, Curve, outcomes_by_image
from peerlearn.evaluation.plots import draw, text_inches
from tests.detection.test_voc import found, target
from tests.drawn import check_texts


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that are saved."""
    saved: list[Figure] = []
    save = Figure.savefig

    def keep(figure: Figure, *arguments: object, **more: object) -> None:
        saved.append(figure)
        save(figure, *arguments, **more)

    monkeypatch.setattr(Figure, "savefig", keep)
    return saved


def curve(recall: list[float], precision: list[float]) -> Curve:
    scores = [1 - n / 10 for n in range(len(recall))]
    return Curve(*(torch.tensor(x, dtype=torch.float64) for x in (recall, precision, scores)))


def texts(figure: Figure) -> list[str]:
    return [text.get_text() for axes in figure.axes for text in axes.texts]


def test_a_panel_for_each_class(tmp_path, figures):
    curves = [curve([0.5, 0.5, 1], [1, 0.5, 2 / 3]), curve([0, 0], [0, 0]), curve([], [])]
    names, ap50 = ["cat", "$x^^$", "y" * 300], [83.3, 0, math.nan]
    file = tmp_path / "a.png"
    given = {"curves": curves, "class_names": names, "per_class_ap50": ap50, "title": "t"}
    draw(partial(plot_precision_recall, **given), file)
    (figure,) = figures
    panels = figure.axes[:3]
    assert [panel.get_title() for panel in panels[:2]] == ["cat  83.3", "$x^^$  0.0"]
    assert panels[2].get_title().count("y") < 25
    assert panels[0].get_ylim() == panels[0].get_xlim() == (0, 100)
    check_texts(figure)
    (line,) = panels[0].lines
    points = [[0, 100], [50, 100], [50, 50], [100, 200 / 3]]
    assert line.get_xydata() == pytest.approx(torch.tensor(points, dtype=torch.float64).numpy())
    assert texts(figure) == ["none found", "no objects"]
    with Image.open(file) as image:
        assert min(image.size) > 300


@pytest.mark.parametrize(("classes", "panels"), [(1, 1), (10, 10), (20, 20), (101, 80)])
def test_any_number_of_classes_has_room(classes, panels, tmp_path, figures):
    curves = [curve([1], [1])] * classes
    ap50 = torch.arange(classes).double()
    names = [f"{number} {'W' * 40}" for number in range(classes)]
    plot_precision_recall(tmp_path / "a.png", curves, names, ap50, title="W" * 100)
    (figure,) = figures
    assert sum(bool(axes.lines) for axes in figure.axes) == panels
    shown = [axes.get_title().split()[0] for axes in figure.axes if axes.lines]
    if classes > 80:
        assert "80 of 101 classes" in figure.get_suptitle().replace("\n", " ")
        assert shown == [str(number) for number in [*range(40), *range(61, 101)]]
    if classes == 10:
        check_texts(figure)
    # No two panels lie on each other.
    boxes = [axes.get_window_extent() for axes in figure.axes if axes.lines]
    assert not any(one.overlaps(other) for n, one in enumerate(boxes) for other in boxes[:n])


APART = [[2, 10, 22, 30], [40, 10, 60, 30], [70, 50, 98, 60]]


def a_sheet(**more: object) -> partial:
    """Right, wrong, too unsure, and an object that is missed; and an image without objects."""
    detections = [
        found([APART[0], APART[2], APART[1]], [0.9, 0.75, 0.4], [0, 0, 1]),
        found([], []),
    ]
    targets = [target(APART[:2], [0, 1]), target([])]
    images = [torch.zeros(3, 64, 100, dtype=torch.uint8), torch.zeros(1, 80, 50, dtype=torch.uint8)]
    given = {
        "images": images,
        "detections": detections,
        "class_names": ["cat", "$dog$"],
        "targets": targets,
        "outcomes": outcomes_by_image(detections, targets, num_classes=2),
        "title": "t",
        **more,
    }
    return partial(draw_sheet, **given)


def test_right_wrong_and_missed_are_told_by_signs(tmp_path, figures):
    draw(a_sheet(), tmp_path / "a.png")
    (figure,) = figures
    assert texts(figure) == ["missed: $dog$", "✓ cat 0.90", "✗ cat 0.75"]
    assert len(figure.axes[0].images) == len(figure.axes[1].images) == 1
    styles = {str(patch.get_linestyle()) for patch in figure.axes[0].patches}
    # The line on white of an object, of a right and of a wrong detection.
    assert len(styles) == 3
    (legend,) = figure.legends
    words = [text.get_text() for text in legend.get_texts()]
    assert words == ["object", "✓ right", "✗ wrong", "~ neither: the object is difficult"]
    with Image.open(tmp_path / "a.png") as image:
        assert min(image.size) > 300


def test_unsure_detections_are_drawn_if_asked_for(tmp_path, figures):
    a_sheet(least_score=0.4)(tmp_path / "a.png")
    assert texts(figures[0]) == ["✓ cat 0.90", "✗ cat 0.75", "✓ $dog$ 0.40"]
    assert "score of 0.40" in figures[0].get_suptitle().replace("\n", " ")
    check_texts(figures[0])


def test_images_without_known_objects_have_their_detections(tmp_path, figures):
    a_sheet(targets=None, outcomes=None)(tmp_path / "a.png")
    assert texts(figures[0]) == ["cat 0.90", "cat 0.75"]
    assert [text.get_text() for text in figures[0].legends[0].get_texts()] == ["detection"]


def test_a_sheet_has_at_most_16_images(tmp_path, figures):
    images = [torch.zeros(3, 8, 8, dtype=torch.uint8)] * 20
    nothing = [found([], [])] * 20
    draw_sheet(tmp_path / "a.png", images, nothing, ["cat"], title="t")
    assert sum(bool(axes.images) for axes in figures[0].axes) == 16


def test_a_photo_is_drawn_with_the_pixels_that_are_seen_and_a_name(tmp_path, figures):
    photo = torch.zeros(3, 1400, 2800, dtype=torch.uint8)
    photo[:, :700] = 200
    draw_sheet(
        tmp_path / "a.png",
        [photo, photo[:, :8, :8]],
        [found([], [])] * 2,
        ["cat"],
        title="t",
        names=["$a$.jpg", "b.jpg"],
    )
    drawn, small = (axes.images[0] for axes in figures[0].axes[:2])
    assert drawn.get_array().shape == (700, 1400, 3)
    assert drawn.get_array()[:350].tolist() == torch.full((350, 1400, 3), 200).tolist()
    # The pixels of the file are what corners count in.
    assert drawn.get_extent() == [0, 2800, 1400, 0]
    assert small.get_array().shape == (8, 8, 3)
    assert [axes.get_title() for axes in figures[0].axes[:2]] == ["$a$.jpg", "b.jpg"]


@pytest.mark.parametrize("look", [_OBJECT, *_LOOKS.values()])
@pytest.mark.parametrize("box", [[0, 0, 5, 5], [95, 75, 100, 80], [0, 0, 100, 80], [-3, 78, 4, 90]])
def test_labels_stay_in_the_image(look, box):
    x, y = _label_corner((80, 100), 3.5, box, look, text_inches("a" * 12))
    assert 0 <= x < x + 20 < 100
    assert 0 <= y < y + 4 < 80


def test_labels_of_right_and_wrong_detections_of_an_object_do_not_meet():
    box = [30, 30, 70, 60]
    corners = [
        _label_corner((80, 100), 3.5, box, _LOOKS[key], text_inches("a" * 8))
        for key in (RIGHT, WRONG)
    ]
    assert corners[0][1] + 4 < 30 < 50 < corners[1][1] < 60


def test_the_table_of_classes(capsys):
    show_classes(["cat", "[red]dog"], [1200, 0], torch.tensor([12.345, math.nan]), title="AP [%]")
    printed = capsys.readouterr().out
    assert "AP [%]" in printed
    rows = [line.split("│")[1:-1] for line in printed.splitlines() if "│" in line]
    cells = [[cell.strip() for cell in row] for row in rows]
    assert cells == [["cat", "1,200", "12.35"], ["[red]dog", "0", ""]]


def test_a_sheet_replaces_a_link_and_not_what_it_leads_to(tmp_path):
    precious = tmp_path / "precious"
    precious.write_text("precious")
    (tmp_path / "a.png").symlink_to(precious)
    (tmp_path / ".a.tmp.png").symlink_to(precious)
    images, nothing = [torch.zeros(3, 8, 8, dtype=torch.uint8)], [found([], [])]
    draw_sheet(tmp_path / "a.png", images, nothing, ["cat"], title="t")
    assert precious.read_text() == "precious"
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert not (tmp_path / "a.png").is_symlink()
