"""Images, neighbours and maps of a page about a run."""

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from peerlearn.errors import UserError
from peerlearn.report.images import image_section
from peerlearn.report.parts import Paragraph, Picture, Section
from peerlearn.report.run_images import read_run_images
from peerlearn.report.tiles import Mark
from peerlearn.report.training_views import draw_views
from peerlearn.runs.directory import RunDirectory
from pretrain import train
from pretrain.method import method_class
from tests.e2e.runs import pretrain

QUICK = ("--epochs", "1", "--monitor.every_epochs", "0", "--data.limit", "100")


@pytest.fixture(scope="module")
def run(once) -> Path:
    return once("report_images", lambda folder: pretrain(folder, *QUICK, "--cohort.networks", "2"))


@pytest.fixture
def copy(run: Path, tmp_path: Path) -> Path:
    return shutil.copytree(run, tmp_path / "run")


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def section_of(run: Path, test_images: int = 40) -> Section:
    return image_section(RunDirectory(run), label="a", anchor="images-1", test_images=test_images)


def pictures(section: Section) -> list[Picture]:
    return [part for part in section.parts if isinstance(part, Picture)]


def paragraphs(section: Section) -> list[str]:
    return [part.text for part in section.parts if isinstance(part, Paragraph)]


def change_config(run: Path, **data) -> None:
    file = RunDirectory(run).config
    config = yaml.safe_load(file.read_text())
    config["data"].update(data)
    file.write_text(yaml.safe_dump(config))


class TestSection:
    def test_views_neighbours_and_maps_of_each_network(self, run: Path):
        section = section_of(run)
        views, *others = pictures(section)
        assert len(others) == 4
        assert not paragraphs(section)
        assert views.caption.startswith("Left: 5 of the 100 training images of digits train")
        assert "flip_probability 0.5" in views.caption
        for network, (near, map_) in enumerate(zip(others[:2], others[2:], strict=True)):
            assert near.caption.startswith(f"Network {network} of step 3: 6 test images")
            assert "nearest of 100 training images of digits" in near.caption
            assert f"Network {network} of step 3: features of 40 of the 360 images" in map_.caption

    def test_same_run_same_bytes_also_from_kept_features(self, run: Path, tmp_path):
        first = section_of(run)
        assert list((tmp_path / "cache").rglob("*.safetensors"))
        assert section_of(run) == first

    def test_nothing_is_written_into_the_run(self, copy: Path):
        before = {path: path.stat().st_mtime_ns for path in copy.rglob("*")}
        section_of(copy)
        assert {path: path.stat().st_mtime_ns for path in copy.rglob("*")} == before

    def test_bytes(self, run: Path):
        total = sum(len(each.image) + len(each.caption) for each in pictures(section_of(run, 360)))
        assert total < 150_000

    def test_ids_are_of_the_section_and_unique(self, run: Path):
        markup = "".join(each.image for each in pictures(section_of(run)))
        ids = re.findall(r' id="([^"]*)"', markup)
        assert len(ids) == len(set(ids))
        assert all(each.startswith("images-1-") for each in ids)
        assert {*re.findall(r'(?:href="|url\()#([^")]*)', markup)} == set(ids)

    def test_neighbours_are_those_of_brute_force(self, run: Path):
        (near, _) = pictures(section_of(run))[1:3]
        rights = re.search(r"(\d+) of 30 neighbours", near.caption)
        assert near.numbers is not None
        cells = [row[1:] for row in near.numbers.rows]
        same = [cell.startswith(f"{row[0]} (") for row in near.numbers.rows for cell in row[1:]]
        assert rights is not None
        assert int(rights[1]) == sum(same)
        assert near.image.count(Mark.RIGHT.value) == sum(same)
        assert near.image.count("stroke-dasharray") == 30 - sum(same)
        assert all(len(row) == 5 for row in cells)


class TestMissing:
    def test_without_data(self, copy: Path, monkeypatch):
        text = RunDirectory(copy).env.read_text()
        RunDirectory(copy).env.write_text(text.replace('"digits"', '"cifar10"'))
        (line,) = paragraphs(section_of(copy))
        assert line.startswith("No images are shown: ")
        assert "cifar" in line
        assert not pictures(section_of(copy))

    def test_without_export_the_views_stay(self, copy: Path):
        shutil.rmtree(copy / "export" / "step-00000003")
        section = section_of(copy)
        (line,) = paragraphs(section)
        assert "step-00000003 is gone" in line
        assert len(pictures(section)) == 1

    def test_damaged_export(self, copy: Path):
        file = next((copy / "export").rglob("net-1/model.safetensors"))
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)
        section = section_of(copy)
        (line,) = paragraphs(section)
        assert "damaged" in line
        assert len(pictures(section)) == 1

    def test_other_data_than_the_run_had(self, copy: Path):
        change_config(copy, limit=99)
        (line,) = paragraphs(section_of(copy))
        assert "has 99 images for the run's config now, and the run has trained on 100" in line

    def test_another_verb(self, copy: Path):
        env = RunDirectory(copy).env
        env.write_text(env.read_text().replace('"verb": "pretrain"', '"verb": "detect"'))
        (line,) = paragraphs(section_of(copy))
        assert "trains by `peerlearn detect`" in line

    def test_folder_without_classes(self, tmp_path: Path):
        photos, run = tmp_path / "photos", tmp_path / "run"
        photos.mkdir()
        generator = np.random.default_rng(0)
        for number in range(40):
            pixels = generator.integers(0, 256, (90, 120, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(photos / f"{number}.jpg")
        folder = ("--data.name", "folder", "--data.root", str(photos), "--data.workers", "0")
        assert pretrain(run, *QUICK, *folder, "--queue.size", "20") == 0
        section = section_of(run)
        (line,) = paragraphs(section)
        assert "photos" in line
        (views,) = pictures(section)
        assert len(views.image) < 60_000
        assert "40 training images of photos train" in views.caption


class TestRunImages:
    @pytest.mark.parametrize(
        "words",
        [
            ("--method", "moco"),
            ("--method", "simclr", "--data.augmentation", "byol", "--seed", "4"),
            ("--method", "supervised", "--data.validation_percent", "20"),
        ],
    )
    def test_views_are_those_that_training_draws(self, words, tmp_path, monkeypatch):
        """By the training's own loader, of the same image in the same epoch."""
        seen = []

        def watch(attempt, batch):
            seen.append((attempt.training, batch))
            raise UserError("seen")

        monkeypatch.setattr(train, "train_step", watch)
        assert pretrain(tmp_path / "run", *QUICK, *words) == 1
        ((training, batch),) = seen
        images = read_run_images(RunDirectory(tmp_path / "run"))
        assert images.trained.fingerprint() == training.dataset.fingerprint()
        mean, std = (
            torch.tensor(each)[:, None, None] for each in (images.trained.mean, images.trained.std)
        )
        for place in (0, 7):
            (drawn,) = draw_views(images, int(batch.index[place]), epochs=1, image_size=16)
            for ours, theirs in zip(drawn, batch.views, strict=True):
                torch.testing.assert_close((ours - mean) / std, theirs[place], atol=1e-5, rtol=0)

    @pytest.mark.parametrize("method", ["moco", "simclr", "supervised", "prototypical"])
    def test_what_methods_draw_and_are_tested_on(self, method: str, copy: Path):
        config = RunDirectory(copy).config
        config.write_text(config.read_text().replace("method: moco", f"method: {method}"))
        images, kind = read_run_images(RunDirectory(copy)), method_class(method)
        assert len(images.recipes) == kind.views
        assert images.is_split_by_class == (kind.labels == "split_by_class")

    def test_a_run_of_a_version_that_knew_no_views(self, copy: Path):
        expected = read_run_images(RunDirectory(copy)).recipes
        config = yaml.safe_load(RunDirectory(copy).config.read_text())
        del config["data"]["views"]
        RunDirectory(copy).config.write_text(yaml.safe_dump(config))
        assert read_run_images(RunDirectory(copy)).recipes == expected
