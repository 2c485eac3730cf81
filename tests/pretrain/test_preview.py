"""What `--dry_run` ends with: images, steps, parameters and memory, and what it refuses."""

from dataclasses import replace

import pytest
import torch

from peerlearn.cli import main
from peerlearn.data.datasets import DATASET_NAMES as LOADED_NAMES
from peerlearn.data.datasets import load_dataset
from peerlearn.data.published import DATASET_NAMES, PUBLISHED
from peerlearn.errors import USAGE, UserError
from pretrain.cohort import build_networks
from pretrain.cohort_config import CohortConfig
from pretrain.config import DataConfig, PretrainConfig
from pretrain.method_config import QueueConfig
from pretrain.preview import _activation_bytes, preview

SMALL = PretrainConfig(
    epochs=3,
    batch_size=32,
    cohort=CohortConfig(backbones="conv4", embedding_dim=16, batch_norm_splits=4),
    queue=QueueConfig(size=1024),
    data=DataConfig(name="digits", limit=100, image_size=16),
)


def test_images_steps_parameters_and_memory():
    images, views, steps, parameters, memory = preview(SMALL).lines
    assert images == "images: 100 of digits train, views of 16 pixels"
    assert views == (
        "each view: crop_scale 0.2 1, crop_ratio 0.75 1.333, flip_probability 0.5, jitter 0.4 0.4 0.4 0.1, "
        "jitter_probability 0.8, grayscale_probability 0.2, blur_probability 0.5, blur_sigma 0.1 2"
    )
    assert steps == "steps: 3 in each of 3 epochs, 9 in all, of 32 images"
    cohort = build_networks(SMALL, in_chans=1, image_size=16, num_classes=0)
    total = sum(p.numel() for p in cohort.parameters())
    one = sum(p.numel() for p in cohort.backbones[0].parameters())
    assert parameters == f"parameters: {total:,} in all; 2 x conv4 of {one:,}"
    assert memory.startswith("memory: about ")


def test_activations_are_those_that_autograd_keeps():
    """A linear layer keeps its input, and normalising keeps what it divides: a closed form for one layer."""

    class Flat(torch.nn.Module):
        heads: tuple[torch.nn.Module, ...] = ()

        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(48, 7)

        def trunk(self, images: torch.Tensor) -> torch.Tensor:
            return images

        def branches(self, trunk: torch.Tensor) -> list[torch.Tensor]:
            return [self.layer(trunk.flatten(1)).relu()]

    for precision, share in (("fp32", 1), ("bf16", 0.5)):
        config = replace(SMALL, precision=precision)
        # 48 inputs of the layer, 7 outputs of the ReLU, each of four bytes.
        found = _activation_bytes(Flat(), torch.zeros(5, 3, 4, 4), config)  # type: ignore[arg-type]
        assert found == share * 4 * (48 + 7)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            replace(SMALL, cohort=CohortConfig(backbones="nonsense")),
            "cohort.backbones: no network is called",
        ),
        (replace(SMALL, data=DataConfig(name="digits", root="/nowhere")), None),
        (
            replace(SMALL, data=DataConfig(name="folder", root="/nowhere")),
            "/nowhere is not a folder",
        ),
        (replace(SMALL, data=DataConfig(name="imagenet")), "imagenet needs data.root"),
        (replace(SMALL, data=DataConfig(name="digits", limit=20)), "lower batch_size (32)"),
        (replace(SMALL, data=DataConfig(name="cifar10", limit=20)), "lower batch_size (32)"),
        (replace(SMALL, data=DataConfig(name="digits", split="unlabeled")), "digits has no split"),
        (
            replace(
                SMALL,
                cohort=CohortConfig(backbones="swin_tiny_patch4_window7_224"),
                data=DataConfig(name="digits", image_size=2),
            ),
            "cannot take images of 2 pixels",
        ),
    ],
)
def test_what_the_start_would_refuse_is_refused(config, message, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(UserError) as caught:
        preview(config)
    assert message is None or message in str(caught.value)


def test_a_dataset_that_is_not_here_is_not_downloaded_and_is_told_as_published(
    tmp_path, monkeypatch
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    data = DataConfig(name="cifar100", fallback="digits")
    images, _, steps, *_ = preview(replace(SMALL, data=data)).lines
    assert images == (
        "images: 50,000 of cifar100 train (not on this machine: the run downloads it, or trains on digits where that "
        "fails), views of 32 pixels"
    )
    assert steps.startswith("steps: 1,562 in each of 3 epochs, 4,686 in all")
    assert not list(tmp_path.iterdir())


def test_the_list_of_data_sets_is_that_of_the_readers():
    assert DATASET_NAMES == LOADED_NAMES
    for name in ("digits", "fashion_mnist", "fashion_mnist_classes"):
        dataset, known = load_dataset(name), PUBLISHED[name]
        assert known is not None
        assert (len(dataset), dataset.num_classes, dataset.channels, dataset.images.shape[-1]) == (
            *(known.images["train"], known.classes, known.channels, known.size),
        )


@pytest.mark.parametrize("words", [[], ["--run", "runs/x"], ["--run=runs/x"]])
def test_a_bare_pretrain_shows_the_recipes_by_size_and_hours(words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["pretrain", *words]) == USAGE
    printed = capsys.readouterr().out
    lines = [line.split() for line in printed.splitlines()]
    sizes = [int(line[1].replace(",", "")) for line in lines if line[2:4] == ["images", "of"]]
    without_labels = sizes[: sizes.index(1_000)]
    assert without_labels == sorted(without_labels)
    assert "mcl_fashion_mnist_demo 8,000 images of fashion_mnist 0.03 h on 2 CPU cores" in [
        " ".join(line) for line in lines
    ]
    assert "--data.name folder --data.root FOLDER" in printed
    assert not list(tmp_path.iterdir())
