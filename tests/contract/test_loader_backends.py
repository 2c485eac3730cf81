"""What every backend of ViewLoader promises; a new one joins by its name in ``BACKENDS`` of tests/view_loaders.py.

The reference is worked out here, from the permutation and the parameters of each single image.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from peerlearn.counter_random import PERMUTATION, SUBSTITUTE, permutation, random_bits
from peerlearn.data.augment import (
    ViewParameters,
    distort,
    draw_view_parameters,
    evaluation_view,
    normalise,
    resized_crop,
)
from peerlearn.data.datasets import ImageDataset
from peerlearn.data.evaluation_views import evaluation_batches
from peerlearn.data.loader import ViewBatch, ViewLoader
from peerlearn.data.recipes import AUGMENTATIONS, Augmentation
from peerlearn.data.unreadable import Unreadable
from peerlearn.errors import UserError
from tests.view_loaders import BACKENDS, NEEDS_FFCV, packed_copy, view_loader

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")

CPU = torch.device("cpu")
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)
SEED = 11
NUM_IMAGES, BATCH_SIZE_GLOBAL, IMAGE_SIZE = 23, 4, 12
CROP_FLIP = AUGMENTATIONS["crop_flip"]


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def tensors() -> ImageDataset:
    """Smooth images with some noise, so that wrong boxes and flips show."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand((NUM_IMAGES, 3, 4, 5), generator=generator) * 235
    images = torch.nn.functional.interpolate(coarse, (17, 22), mode="bilinear")
    images += torch.rand(images.shape, generator=generator) * 20
    return ImageDataset(
        name="made",
        split="train",
        images=images.to(torch.uint8),
        labels=torch.arange(NUM_IMAGES) * 7 % 5,
        class_names=tuple("abcde"),
        mean=MEAN,
        std=STD,
    )


@pytest.fixture(scope="module")
def files(tensors: ImageDataset, tmp_path_factory: pytest.TempPathFactory) -> ImageDataset:
    """The same images as PNG files."""
    folder = tmp_path_factory.mktemp("images")
    paths = tuple(folder / f"{i}.png" for i in range(NUM_IMAGES))
    for path, image in zip(paths, tensors.images, strict=True):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(path)
    return replace(tensors, images=paths)


@pytest.fixture(params=["tensors", "files"])
def dataset(request: pytest.FixtureRequest) -> ImageDataset:
    return request.getfixturevalue(request.param)


def make(dataset: ImageDataset, backend: str, **changes: object) -> ViewLoader:
    arguments = {
        "augmentation": CROP_FLIP,
        "backend": backend,
        "image_size": IMAGE_SIZE,
        "batch_size_global": BATCH_SIZE_GLOBAL,
        "seed": SEED,
        "device": CPU,
    }
    return view_loader(dataset, **{**arguments, **changes})


def indices(batches: Iterator[ViewBatch] | list[ViewBatch]) -> list[int]:
    return [i for batch in batches for i in batch.index.tolist()]


def reference_parameters(
    dataset: ImageDataset, augmentation: Augmentation, epoch: int, index: int, view: int
) -> ViewParameters:
    _, height, width = dataset.read(index).shape
    return draw_view_parameters(
        augmentation,
        seed=SEED,
        epoch=epoch,
        index=torch.tensor([index]),
        draw=torch.tensor([0]),
        view=view,
        height=height,
        width=width,
    )


def reference_view(
    dataset: ImageDataset, augmentation: Augmentation, epoch: int, index: int, view: int
) -> Tensor:
    """The view of one image (channels, size, size), alone."""
    image = dataset.read(index)[None]
    parameters = reference_parameters(dataset, augmentation, epoch, index, view)
    crop = resized_crop(image, parameters.box, IMAGE_SIZE)
    return normalise(distort(crop, parameters, augmentation), MEAN, STD)[0]


def in_pixels(views: Tensor) -> Tensor:
    return views * torch.tensor(STD)[:, None, None] + torch.tensor(MEAN)[:, None, None]


def assert_same(ours: list[ViewBatch], others: list[ViewBatch]) -> None:
    """Bit for bit."""
    assert len(ours) == len(others)
    for one, other in zip(ours, others, strict=True):
        assert torch.equal(one.index, other.index)
        assert torch.equal(one.labels, other.labels)
        assert all(map(torch.equal, one.views, other.views))


def test_order_labels_and_shapes(dataset: ImageDataset, backend: str):
    loader = make(dataset, backend)
    assert loader.steps_per_epoch == NUM_IMAGES // BATCH_SIZE_GLOBAL == 5
    batches = list(loader.epoch(3))
    assert len(batches) == 5
    order = permutation(NUM_IMAGES, PERMUTATION, SEED, 3)
    assert indices(batches) == order[:20].tolist()
    for batch in batches:
        assert torch.equal(batch.labels, dataset.labels[batch.index])
        assert batch.labels.dtype == batch.index.dtype == torch.int64
        assert [view.shape for view in batch.views] == [(4, 3, IMAGE_SIZE, IMAGE_SIZE)] * 2
        assert {view.dtype for view in batch.views} == {torch.float32}


@pytest.mark.parametrize("workers", [0, 2])
def test_views_are_the_reference_within_one_grey_level(
    dataset: ImageDataset, backend: str, workers: int
):
    for batch in make(dataset, backend, views=3, workers=workers).epoch(1):
        assert len(batch.views) == 3
        for view, pixels in enumerate(batch.views):
            expected = torch.stack(
                [reference_view(dataset, CROP_FLIP, 1, i, view) for i in batch.index.tolist()]
            )
            difference = (in_pixels(pixels) - in_pixels(expected)).abs().max()
            assert difference <= 1 / 255
            # Rounding to uint8 is all that may lie between.
            assert difference <= (0.5 / 255 if backend == "folder" else 0) + 1e-5


@pytest.mark.parametrize("recipe", ["moco_v1", "moco_v2"])
def test_distortions_are_those_of_the_reference(dataset: ImageDataset, backend: str, recipe: str):
    augmentation = AUGMENTATIONS[recipe]
    for batch in make(dataset, backend, augmentation=augmentation).epoch(0):
        for view, pixels in enumerate(batch.views):
            for i, ours in zip(batch.index.tolist(), pixels, strict=True):
                expected = reference_view(dataset, augmentation, 0, i, view)
                # Hue blows up the rounding of nearly grey pixels: hence the mean. Another
                # parameter (a flip, an order, a factor) is several times that far away.
                assert (in_pixels(ours) - in_pixels(expected)).abs().mean() <= 1 / 255


def test_parameters_are_those_of_each_image_alone(
    dataset: ImageDataset, backend: str, monkeypatch: pytest.MonkeyPatch
):
    used: list[ViewParameters] = []

    def recording(crops: Tensor, parameters: ViewParameters, augmentation: Augmentation) -> Tensor:
        used.append(parameters)
        return crops

    monkeypatch.setattr("peerlearn.data.loader.distort", recording)
    augmentation = AUGMENTATIONS["moco_v2"]
    batches = list(make(dataset, backend, augmentation=augmentation, workers=1).epoch(6))
    assert len(used) == 2 * len(batches)
    for position, parameters in enumerate(used):
        batch, view = batches[position // 2], position % 2
        alone = [
            reference_parameters(dataset, augmentation, 6, i, view) for i in batch.index.tolist()
        ]
        for ours, expected in zip(parameters, zip(*alone, strict=True), strict=True):
            assert torch.equal(ours, torch.cat(expected))


@pytest.mark.parametrize("backend", BACKENDS[1:])
def test_images_of_several_sizes(backend: str, files: ImageDataset, tmp_path: Path):
    sizes = [(9, 30), (30, 9), (12, 12), (40, 41), (5, 7)]
    paths = tuple(tmp_path / f"{i}.png" for i in range(len(sizes)))
    for path, size in zip(paths, sizes, strict=True):
        pixels = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
    dataset = replace(files, images=paths, labels=None)
    (batch,) = make(dataset, backend, batch_size_global=5).epoch(0)
    for view, pixels in enumerate(batch.views):
        for i, ours in zip(batch.index.tolist(), pixels, strict=True):
            expected = reference_view(dataset, CROP_FLIP, 0, i, view)
            assert (in_pixels(ours) - in_pixels(expected)).abs().max() <= 0.5 / 255 + 1e-5


def test_ranks_concatenate_to_one_process(dataset: ImageDataset, backend: str):
    whole = make(dataset, backend, batch_size_global=6).epoch(2)
    ranks = (
        make(dataset, backend, batch_size_global=6, rank=rank, world_size=2).epoch(2)
        for rank in range(2)
    )
    steps = 0
    for one, first, second in zip(whole, *ranks, strict=True):
        assert torch.equal(one.index, torch.cat([first.index, second.index]))
        assert torch.equal(one.labels, torch.cat([first.labels, second.labels]))
        for view, halves in enumerate(zip(first.views, second.views, strict=True)):
            torch.testing.assert_close(one.views[view], torch.cat(halves), atol=1e-5, rtol=0)
        steps += 1
    assert steps == 3


@pytest.mark.parametrize("workers", [0, 2])
def test_start_step_is_the_tail_of_the_epoch(backend: str, workers: int, files: ImageDataset):
    loader = make(files, backend, workers=workers)
    whole = list(loader.epoch(5))
    for start_step in range(6):
        assert_same(list(loader.epoch(5, start_step)), whole[start_step:])


@pytest.mark.parametrize("start_step", [-1, 6])
def test_start_step_outside_the_epoch(backend: str, start_step: int, tensors: ImageDataset):
    with pytest.raises(ValueError, match="start_step"):
        next(make(tensors, backend).epoch(0, start_step))


@pytest.mark.parametrize("workers", [1, 3])
def test_workers_change_nothing(dataset: ImageDataset, backend: str, workers: int):
    augmentation = AUGMENTATIONS["moco_v2"]
    alone = make(dataset, backend, augmentation=augmentation)
    helped = make(dataset, backend, augmentation=augmentation, workers=workers)
    for epoch in range(2):
        assert_same(list(helped.epoch(epoch)), list(alone.epoch(epoch)))


@pytest.mark.parametrize("workers", [0, 2])
def test_an_abandoned_epoch_leaves_nothing_behind(backend: str, workers: int, files: ImageDataset):
    loader = make(files, backend, workers=workers)
    next(loader.epoch(0))
    abandoned = loader.epoch(1)
    next(abandoned)
    next(abandoned)
    abandoned.close()
    assert_same(list(loader.epoch(1)), list(make(files, backend).epoch(1)))


def test_epochs_seeds_and_views_differ(dataset: ImageDataset, backend: str):
    loader = make(dataset, backend)
    first, second = list(loader.epoch(0)), list(loader.epoch(1))
    assert indices(first) != indices(second)
    assert indices(make(dataset, backend, seed=SEED + 1).epoch(0)) != indices(first)
    assert not torch.equal(first[0].views[0], first[0].views[1])
    both = set(indices(first)) & set(indices(second))
    views = [
        {i: v for batch in epoch for i, v in zip(batch.index.tolist(), batch.views[0], strict=True)}
        for epoch in (first, second)
    ]
    assert not any(torch.equal(views[0][i], views[1][i]) for i in both)
    assert_same(list(loader.epoch(0)), first)


@pytest.mark.parametrize(("batch_size_global", "steps"), [(1, 23), (7, 3), (22, 1), (23, 1)])
def test_last_incomplete_batch_is_dropped(
    backend: str, batch_size_global: int, steps: int, tensors: ImageDataset
):
    loader = make(tensors, backend, batch_size_global=batch_size_global)
    assert loader.steps_per_epoch == steps
    seen = indices(loader.epoch(0))
    assert len(seen) == len(set(seen)) == steps * batch_size_global


def test_without_labels(backend: str, tensors: ImageDataset):
    loader = make(replace(tensors, labels=None), backend)
    assert [batch.labels for batch in loader.epoch(0)] == [None] * 5


def test_global_random_streams_are_untouched(backend: str, files: ImageDataset):
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    list(make(files, backend, workers=1).epoch(0))
    list(make(files, backend).epoch(0))
    list(evaluation_batches(files, image_size=8, batch_size=5, device=CPU))
    assert torch.equal(torch.rand(3), expected)


def test_a_batch_that_the_ranks_cannot_share(backend: str, tensors: ImageDataset):
    with pytest.raises(UserError, match=r"batch_size 5 .* 2 ranks"):
        make(tensors, backend, batch_size_global=5, world_size=2)


def test_fewer_images_than_one_batch(backend: str, tensors: ImageDataset):
    with pytest.raises(UserError, match=r"23 images.*batch_size \(24\).*data\.limit"):
        make(tensors, backend, batch_size_global=24)


# Images that cannot be decoded

# By number and reason; the first choice in the place of 17 is 7.
UNREADABLE = {
    0: "image file is truncated",
    7: "no image in any known format",
    9: "no image in any known format",
    17: "No such file or directory",
}


@pytest.fixture(scope="module")
def damaged(files: ImageDataset, tmp_path_factory: pytest.TempPathFactory) -> ImageDataset:
    """The files, those in ``UNREADABLE`` truncated, empty, of plain text and gone."""
    folder = tmp_path_factory.mktemp("damaged")
    contents = (files.images[0].read_bytes()[:200], b"", b"plain text", None)
    paths = list(files.images)
    for i, content in zip(UNREADABLE, contents, strict=True):
        paths[i] = folder / f"{i}.png"
        if content is not None:
            paths[i].write_bytes(content)
    return replace(files, images=tuple(paths))


def reference_source(index: int) -> int:
    """The image whose pixels and label stand in row ``index``."""
    source, attempt = index, 0
    while source in UNREADABLE:
        source = int(random_bits(SUBSTITUTE, SEED, index, attempt)) % NUM_IMAGES
        attempt += 1
    return source


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("workers", [0, 1, 3])
def test_unreadable_images_are_substituted_and_reported(
    backend: str, workers: int, world_size: int, damaged: ImageDataset, files: ImageDataset
):
    order = permutation(NUM_IMAGES, PERMUTATION, SEED, 0).tolist()
    assert set(UNREADABLE) <= set(order[:20])
    per_rank = BATCH_SIZE_GLOBAL // world_size
    for rank in range(world_size):
        ranks = {"rank": rank, "world_size": world_size}
        loader = make(damaged, backend, workers=workers, max_unreadable_percent=20, **ranks)
        for start_step in (0, 3):
            first = start_step * BATCH_SIZE_GLOBAL + rank * per_rank
            for batch in loader.epoch(0, start_step):
                assert_substituted(batch, order[first : first + per_rank], damaged, files)
                first += BATCH_SIZE_GLOBAL
            assert first == 20 + rank * per_rank


def assert_substituted(
    batch: ViewBatch, index: list[int], damaged: ImageDataset, files: ImageDataset
) -> None:
    """The batch draws ``index`` in epoch 0; the intact files show what the substitutes are."""
    assert batch.index.tolist() == index
    expected = [
        Unreadable(i, str(damaged.images[i]), UNREADABLE[i]) for i in index if i in UNREADABLE
    ]
    assert list(batch.unreadable) == expected
    sources = [reference_source(i) for i in index]
    assert batch.labels.tolist() == files.labels[sources].tolist()
    for view, pixels in enumerate(batch.views):
        for i, source, ours in zip(index, sources, pixels, strict=True):
            parameters = reference_parameters(files, CROP_FLIP, 0, i, view)
            crop = resized_crop(files.read(source)[None], parameters.box, IMAGE_SIZE)
            view_of_source = normalise(distort(crop, parameters, CROP_FLIP), MEAN, STD)[0]
            difference = (in_pixels(ours) - in_pixels(view_of_source)).abs().max()
            assert difference <= 0.5 / 255 + 1e-5


def test_readable_images_are_not_reported(dataset: ImageDataset, backend: str):
    loader = make(dataset, backend, max_unreadable_percent=0)
    assert loader.unreadable == ()
    assert {batch.unreadable for batch in loader.epoch(0)} == {()}


@pytest.mark.parametrize("workers", [0, 2])
def test_a_dataset_without_a_readable_image_is_refused(
    backend: str, workers: int, files: ImageDataset, tmp_path: Path
):
    dataset = replace(files, images=tuple(tmp_path / f"{i}.png" for i in range(NUM_IMAGES)))

    def train() -> None:
        list(make(dataset, backend, workers=workers, max_unreadable_percent=100).epoch(0))

    with pytest.raises(UserError, match=r"\Acannot decode [^\n]*\.png .*data\.root\Z"):
        train()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_agrees_with_the_cpu(dataset: ImageDataset, backend: str):
    workers = 2 if backend == "folder" else 0
    cuda = make(dataset, backend, device=torch.device("cuda"), workers=workers)
    for ours, expected in zip(cuda.epoch(0), make(dataset, backend).epoch(0), strict=True):
        assert ours.labels.is_cuda
        assert not ours.index.is_cuda
        assert torch.equal(ours.index, expected.index)
        for one, other in zip(ours.views, expected.views, strict=True):
            torch.testing.assert_close(one.cpu(), other, atol=1e-4, rtol=0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("workers", [0, 2])
def test_cuda_substitutes_like_the_cpu(damaged: ImageDataset, backend: str, workers: int):
    arguments = {"workers": workers, "max_unreadable_percent": 20}
    cuda = make(damaged, backend, device=torch.device("cuda"), **arguments)
    for ours, expected in zip(
        cuda.epoch(0), make(damaged, backend, **arguments).epoch(0), strict=True
    ):
        assert torch.equal(ours.labels.cpu(), expected.labels)
        assert ours.unreadable == expected.unreadable
        for one, other in zip(ours.views, expected.views, strict=True):
            torch.testing.assert_close(one.cpu(), other, atol=1e-4, rtol=0)


@NEEDS_FFCV
@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_batches_of_a_packed_file_are_those_of_the_files(
    files: ImageDataset, workers: int
):
    views = [
        list(
            evaluation_batches(
                each, image_size=14, batch_size=5, device=CPU, workers=workers, start=3
            )
        )
        for each in (files, packed_copy(files))
    ]
    assert len(views[0]) == 4
    assert all(map(torch.equal, *views))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("batch_size", [5, 23, 40])
def test_evaluation_batches_show_every_image_once(
    dataset: ImageDataset, workers: int, batch_size: int
):
    batches = list(
        evaluation_batches(
            dataset, image_size=14, batch_size=batch_size, device=CPU, workers=workers
        )
    )
    assert all(len(batch) == batch_size for batch in batches[:-1])
    views = torch.cat(batches)
    assert views.shape == (NUM_IMAGES, 3, 14, 14)
    assert views.dtype == torch.float32
    for i, view in enumerate(views):
        expected = normalise(evaluation_view(dataset.read(i)[None], size=14), MEAN, STD)[0]
        assert (in_pixels(view) - in_pixels(expected)).abs().max() <= 0.5 / 255 + 1e-5


@pytest.mark.parametrize(("start", "stop"), [(0, 9), (9, 23), (20, None), (7, 7), (0, 0)])
def test_evaluation_of_a_part(dataset: ImageDataset, start: int, stop: int | None):
    def views(**part: int | None) -> list[Tensor]:
        return [
            view
            for batch in evaluation_batches(dataset, image_size=8, batch_size=4, device=CPU, **part)
            for view in batch
        ]

    ours, whole = views(start=start, stop=stop), views()
    assert len(ours) == len(whole[start:stop])
    assert all(map(torch.equal, ours, whole[start:stop]))
