"""`peerlearn data show`: a sheet of the random views that a run would train on."""

import os
from collections.abc import Sequence
from pathlib import Path

from peerlearn.config import ArgumentParser, config_to_yaml, parse_config
from peerlearn.errors import DONE, UsageError, UserError
from peerlearn.evaluation.plots import check_picture
from pretrain.command import SHIPPED
from pretrain.config import PretrainConfig
from pretrain.view_sheet import Row, Sheet, draw_sheet, image_name

_MOST_IMAGES = 32
# So many views stand beside each image: those of several epochs.
_VIEWS_IN_A_ROW = 6


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
        description="Draw the first images of a run and the views that it draws of them, as a picture. -o FILE: the "
        "file, .png, .svg or .pdf (views.png). --images N: how many images (8).",
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
    check_picture(output)
    if os.path.isdir(output):
        raise UsageError(f"--output {output} is a folder: name a file")
    sheet = _sheet(config, arguments.images)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        draw_sheet(output, sheet)
    except OSError as error:
        raise UserError(
            f"{output} cannot be written ({error.strerror}): choose another file by --output"
        ) from error
    print(sheet.caption)
    print(f"wrote {output}")
    return DONE


def _sheet(config: PretrainConfig, images: int) -> Sheet:
    """The first images of the run's first batch, and the views that the run draws of them in its first epochs."""
    # Imported here: a wrong word should not wait for torch.
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
        rows.append(Row(image_name(dataset, int(index)), panels))
    return Sheet(
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
