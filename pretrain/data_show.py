"""`peerlearn data show`: a sheet of the random views that a run would train on."""

import os
from collections.abc import Sequence
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING, NamedTuple

from peerlearn.config import ArgumentParser, config_to_yaml, parse_config
from peerlearn.errors import DONE, UsageError, UserError
from peerlearn.runs.text import printable
from pretrain.command import SHIPPED
from pretrain.config import PretrainConfig

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from torch import Tensor

_MOST_IMAGES = 32
# So many views stand beside each image: those of several epochs.
_VIEWS_IN_A_ROW = 6
# In inches. A caption of so many signs fits into a line of the sheet.
_PANEL_INCHES, _LINE_INCHES = 1.25, 0.17
_LINE_LETTERS = 180


class _Row(NamedTuple):
    """An image of the sheet.

    name: number of the image in the data set, and its class.
    panels: the image, uint8 (channels, h, w), and its views, float in [0, 1].
    """

    name: str
    panels: "list[Tensor]"


class _Sheet(NamedTuple):
    """What is drawn: titles of the columns, rows, and the text above."""

    titles: list[str]
    rows: list[_Row]
    caption: str


def main(argv: Sequence[str]) -> int:
    """`peerlearn data show [CONFIG] [--key value ...] [-o FILE.png] [--images N]`.

    Returns:
        The exit code.

    Raises:
        UserError: a wrong word, images that cannot be had, or a file that cannot be written.
    """
    parser = ArgumentParser(prog="peerlearn data show", add_help=False, allow_abbrev=False)
    parser.add_argument("-o", "--output", type=Path, default=Path("views.png"))
    parser.add_argument("--images", type=int, default=8)
    arguments, words = parser.parse_known_args(argv)
    config, dry_run = parse_config(
        PretrainConfig,
        words,
        verb="data show",
        description="Draw the first images of a run and the views that it draws of them, as a PNG file. -o FILE.png: "
        "the file (views.png). --images N: how many images (8).",
        example="peerlearn data show mcl_fashion_mnist_demo --data.views.blur_probability 0.5 -o views.png",
        essential=(
            *(
                "data.name",
                "data.root",
                "data.augmentation",
                "data.crop_scale",
                "data.views.jitter",
            ),
            *("data.views.blur_probability", "data.views.second.blur_probability"),
        ),
        shipped=SHIPPED,
        usage="[CONFIG] [--key value ...] [-o FILE.png] [--images N]",
    )
    if dry_run:
        print(config_to_yaml(config), end="")
        return DONE
    if not 1 <= arguments.images <= _MOST_IMAGES:
        raise UsageError(f"--images must be within 1..{_MOST_IMAGES}, got {arguments.images}")
    output: Path = arguments.output
    if output.suffix.lower() != ".png":
        raise UsageError(f"--output {output} must end in .png: the picture is a PNG file")
    if os.path.isdir(output):
        raise UsageError(f"--output {output} is a folder: name a file")
    # Imported here: a wrong word should not wait for torch and matplotlib.
    from peerlearn.evaluation.plots import plain_style

    sheet = _sheet(config, arguments.images)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with plain_style():
            _draw(output, sheet)
    except OSError as error:
        raise UserError(
            f"{output} cannot be written ({error.strerror}): choose another file by --output"
        ) from error
    print(sheet.caption)
    print(f"wrote {output}")
    return DONE


def _sheet(config: PretrainConfig, images: int) -> _Sheet:
    """The first images of the run's first batch, and the views that the run draws of them in its first epochs."""
    import torch

    from peerlearn.compute.dist import Ranks
    from peerlearn.data.augment import distort, draw_view_parameters, pixels, resized_crop
    from pretrain.method import method_class
    from pretrain.preview import views_in_words
    from pretrain.training_data import load_training_data, view_recipes

    cpu = torch.device("cpu")
    kind = method_class(config.method)
    recipes = view_recipes(config, kind.views)
    data = load_training_data(config, Ranks(cpu), kind.labels)
    dataset, size = data.train, data.image_size
    order = kind.sampler(config, dataset).order(0)
    columns = [
        (epoch, view)
        for epoch in range(_VIEWS_IN_A_ROW // kind.views)
        for view in range(kind.views)
    ]
    rows = []
    for index, draw in zip(order.index[0, :images], order.draw[0, :images], strict=True):
        image = dataset.read(int(index))
        panels = [image]
        for epoch, view in columns:
            recipe = recipes[view]
            parameters = draw_view_parameters(
                recipe,
                seed=config.seed,
                epoch=epoch,
                index=index[None],
                draw=draw[None],
                view=view,
                height=image.shape[1],
                width=image.shape[2],
            )
            crop = pixels(resized_crop(image[None], parameters.box, size), cpu)
            panels.append(distort(crop, parameters, recipe)[0])
        name = f"{int(index):,}"
        if dataset.labels is not None and dataset.class_names:
            name = f"{name}\n{dataset.class_names[int(dataset.labels[index])]}"
        rows.append(_Row(name, panels))
    return _Sheet(
        ["image", *(f"epoch {epoch}, view {view + 1}" for epoch, view in columns)],
        rows,
        "\n".join(
            [
                f"{dataset.title} {dataset.split}, recipe {config.data.augmentation}, views of {size} pixels, seed "
                f"{config.seed}",
                *views_in_words(recipes),
            ]
        ),
    )


def _draw(file: Path, sheet: _Sheet) -> None:
    from matplotlib.figure import Figure

    from peerlearn.evaluation.plots import LONGEST_NAME, plain_text, save_figure

    lines = "\n".join(fill(line, _LINE_LETTERS) for line in sheet.caption.splitlines())
    width = _PANEL_INCHES * len(sheet.titles) + 0.9
    height = _PANEL_INCHES * len(sheet.rows) + 0.4 + _LINE_INCHES * (1 + lines.count("\n"))
    with plain_text():
        figure = Figure(figsize=(width, height), layout="constrained")
        panels = figure.subplots(len(sheet.rows), len(sheet.titles), squeeze=False)
        for row, beside in zip(sheet.rows, panels, strict=True):
            for image, panel in zip(row.panels, beside, strict=True):
                _draw_image(panel, image)
            name = "\n".join(printable(part, LONGEST_NAME) for part in row.name.split("\n"))
            beside[0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize=7)
        for title, panel in zip(sheet.titles, panels[0], strict=True):
            panel.set_title(title, fontsize=8)
        figure.suptitle(lines, fontsize=8, x=0.01, ha="left")
        save_figure(figure, file, dpi=120)


def _draw_image(panel: "Axes", image: "Tensor") -> None:
    panel.set(xticks=[], yticks=[])
    panel.set_frame_on(False)
    white = 1.0 if image.is_floating_point() else 255
    shown = image.permute(1, 2, 0) if len(image) == 3 else image[0]
    panel.imshow(shown.numpy(), cmap="gray", vmin=0, vmax=white, interpolation="nearest")
