"""`peerlearn export` of whole runs, trained here, and of exports that stand alone."""

import hashlib
import json
import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file

import peerlearn  # noqa: F401  timm learns our networks' names from it
from peerlearn.cli import main
from peerlearn.evaluation.selection import select_networks
from peerlearn.export import load_export
from peerlearn.runs.checkpoint import load_checkpoint, saved_steps

SMALL = [
    *("--data.name", "digits", "--data.limit", "32", "--data.image_size", "16"),
    *("--data.augmentation", "crop_flip", "--batch_size", "16", "--epochs", "2"),
    *("--cohort.embedding_dim", "8", "--queue.size", "32", "--queue.momentum", "0.5"),
    *("--monitor.every_epochs", "0", "--base_lr", "0.5", "--device", "cpu"),
]
LAST = "step-00000004"


def pretrain(run: Path, *more: str) -> Path:
    assert main(["pretrain", *SMALL, "--run", str(run), *more]) == 0
    return run


@pytest.fixture(scope="module")
def shared_run(tmp_path_factory) -> Path:
    """Two Conv-4 that share three stages, with batch norm in two parts; saves of steps 2 and 4, exports of step 4."""
    run = tmp_path_factory.mktemp("runs") / "shared"
    more = ["--cohort.share_stages", "3", "--cohort.batch_norm_splits", "2"]
    return pretrain(run, "--cohort.backbones", "conv4", *more)


@pytest.fixture(scope="module")
def mixed_run(tmp_path_factory) -> Path:
    """A ResNet-18 with a small stem and a Conv-4."""
    run = tmp_path_factory.mktemp("runs") / "mixed"
    names = ["--cohort.backbones", '["resnet18", "conv4"]']
    return pretrain(run, *names, "--cohort.small_images", "true", "--cohort.share_stages", "0")


def files_of(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


def saved_backbone(run: Path, step: str, group: str, number: int) -> dict[str, torch.Tensor]:
    """From the checkpoint by hand: a shared tensor stands under network 0's name alone."""
    tensors = load_checkpoint(run / "checkpoints" / step)[0][group]
    found = {}
    for owner in (0, number):
        prefix = f"backbones.{owner}."
        found |= {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
    return found


def test_what_training_exported_is_found_the_same_and_left_alone(shared_run, capsys):
    folders = [shared_run / "export" / LAST / name for name in ("net-0", "net-1")]
    before = [(folder.stat().st_ino, files_of(folder)) for folder in folders]
    assert main(["export", str(shared_run)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == [f"{folder}: is there already, the same" for folder in folders]
    assert lines[2].startswith(f'to load one: timm.create_model("local-dir:{folders[0]}"')
    assert [(folder.stat().st_ino, files_of(folder)) for folder in folders] == before


def test_a_save_gives_the_bytes_that_training_exported(shared_run, tmp_path):
    assert main(["export", str(shared_run), "--output", str(tmp_path / "out")]) == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"net-0", "net-1"}
    for name in ("net-0", "net-1"):
        assert files_of(tmp_path / "out" / name) == files_of(shared_run / "export" / LAST / name)


@pytest.mark.parametrize("step", ["step-00000002", LAST])
@pytest.mark.parametrize("number", [0, 1])
def test_momentum_networks_that_were_never_exported(shared_run, tmp_path, step, number):
    words = ["--network", f"key-{number}", "--step", str(int(step[5:])), "--output", str(tmp_path)]
    assert main(["export", str(shared_run), *words]) == 0
    folder = tmp_path / f"net-{number}-key"
    assert [path.name for path in tmp_path.iterdir()] == [folder.name]
    expected = saved_backbone(shared_run, step, "key_networks", number)
    exported = load_file(folder / "model.safetensors")
    assert exported.keys() == expected.keys()
    assert all(torch.equal(exported[name], tensor) for name, tensor in expected.items())
    query = saved_backbone(shared_run, step, "networks", number)
    assert not torch.equal(query["layer1.0.weight"], exported["layer1.0.weight"])
    assert f"| step | {int(step[5:])} |" in (folder / "README.md").read_text()
    x = torch.randn(2, 1, 16, 16)
    by_timm = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    with torch.no_grad():
        assert torch.equal(by_timm(x), load_export(folder)(x))


def test_the_default_place_is_the_steps_and_leaves_latest_alone(shared_run, capsys):
    words = ["export", str(shared_run), "--step", "2", "--network", "0"]
    assert main(words) == 0
    folder = shared_run / "export/step-00000002/net-0"
    assert capsys.readouterr().out.startswith(f"{folder}\n")
    assert [path.name for path in folder.parent.iterdir()] == ["net-0"]
    assert (shared_run / "export/latest").read_text().strip() == LAST
    expected = saved_backbone(shared_run, "step-00000002", "networks", 0)
    exported = load_file(folder / "model.safetensors")
    assert all(torch.equal(exported[name], tensor) for name, tensor in expected.items())
    assert main(words) == 0
    assert "is there already, the same" in capsys.readouterr().out


def test_torchvision_of_a_run(mixed_run, tmp_path, capsys):
    words = ["export", str(mixed_run), "--format", "torchvision"]
    assert main([*words, "--network", "key-0"]) == 0
    folder = mixed_run / "export" / LAST / "net-0-key-torchvision"
    lines = capsys.readouterr().out.splitlines()
    assert lines == [str(folder), f"to load one: the lines of {folder / 'README.md'}"]
    (code,) = re.findall(
        r"```python\n(.*?)```", (folder / "README.md").read_text(), flags=re.DOTALL
    )
    scope: dict = {}
    exec(code.replace("FOLDER", str(folder)), scope)
    expected = saved_backbone(mixed_run, LAST, "key_networks", 0)
    state = scope["backbone"].state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in expected.items())
    # Evaluators see the exports alone.
    assert list(select_networks(mixed_run, "all").folders) == ["0", "1"]
    # Not even the first is written where the second cannot be.
    assert main([*words, "--output", str(tmp_path / "out")]) == 1
    assert "net-1: conv4_cifar cannot be had for torchvision" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def refused(capsys, *words: str) -> tuple[int, str]:
    code = main(["export", *words])
    found = capsys.readouterr()
    assert (found.out, found.err.count("\n")) == ("", 1)
    return code, found.err


def test_networks_and_steps_that_there_are_not(shared_run, mixed_run, tmp_path, capsys):
    run = str(shared_run)
    for words, message in (
        ([run, "--network", "2"], "has no such network; choose from 0, 1, key-0, key-1, all"),
        ([run, "--network", "key-2"], "has no such network; choose from 0, 1, key-0, key-1, all"),
        ([run, "--network", "ensemble"], "--network ensemble: an export is one network"),
        ([run, "--step", "3"], f"no such save in {shared_run / 'checkpoints'}, which has 4, 2\n"),
        ([str(shared_run / "export" / LAST), "--step", "4"], "is no run, and only runs have steps"),
        ([str(shared_run / "export" / LAST), "--network", "5"], "--network 5: not in"),
    ):
        code, err = refused(capsys, *words)
        assert code == 2
        assert message in err
    code, err = refused(capsys, str(tmp_path / "none"))
    assert code == 1
    assert "no exported networks here" in err
    code, err = refused(capsys, str(mixed_run), "--network", "0", "--format", "detectron2")
    assert code == 1
    assert "net-0: Detectron2's ResNets have a 7x7 stem" in err


def test_simclr_has_no_momentum_networks(tmp_path, capsys):
    run = pretrain(tmp_path / "run", "--cohort.backbones", "conv4", "--method", "simclr")
    capsys.readouterr()
    code, err = refused(capsys, str(run), "--network", "key-0")
    assert code == 2
    assert f"--network key-0: {run} was trained by simclr, which has no momentum networks" in err
    code, err = refused(capsys, str(run), "--network", "7")
    assert "choose from 0, 1, all" in err
    assert main(["export", str(run), "--network", "1"]) == 0


def test_a_damaged_save_is_passed_over_unless_it_was_asked_for(
    shared_run, tmp_path, capsys, caplog
):
    run = tmp_path / "run"
    shutil.copytree(shared_run, run)
    (run / "checkpoints" / LAST / "networks.safetensors").write_bytes(b"cut short")
    words = ["--network", "1", "--output", str(tmp_path / "out")]
    code, err = refused(capsys, str(run), *words, "--step", "4")
    assert code == 1
    assert "networks.safetensors: missing or damaged" in err
    assert main(["export", str(run), *words]) == 0
    assert "passed over a damaged checkpoint" in caplog.text
    assert "| step | 2 |" in (tmp_path / "out/net-1/README.md").read_text()
    shutil.rmtree(run / "checkpoints/step-00000002")
    caplog.clear()
    code = main(["export", str(run)])
    assert code == 1
    assert "no checkpoint is whole; exports can be given instead" in capsys.readouterr().err
    code, err = refused(capsys, str(run), "--step", "2")
    assert code == 2
    assert "which has 4" in err
    shutil.rmtree(run / "checkpoints")
    code, err = refused(capsys, str(run), "--step", "4")
    assert f"which has none; its exports can be given instead: {run / 'export' / LAST}" in err


def test_the_config_that_counts_is_the_saves_own(shared_run, tmp_path, capsys):
    """config.yaml may have been changed since: the card tells what the networks were trained by."""
    run = tmp_path / "run"
    shutil.copytree(shared_run, run)
    config = run / "config.yaml"
    text = config.read_text()
    config.write_text(
        text.replace("embedding_dim: 8", "embedding_dim: 9").replace("seed: 0", "seed: 7")
    )
    assert config.read_text() != text
    assert main(["export", str(run), "--output", str(tmp_path / "out")]) == 0
    for net in ("net-0", "net-1"):
        for file in (tmp_path / "out" / net).iterdir():
            trained = shared_run / "export" / LAST / net / file.name
            assert file.read_bytes() == trained.read_bytes()


def test_a_save_that_lacks_what_it_needs_is_one_line(shared_run, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(shared_run, run)
    (save,) = [path for path in saved_steps(run / "checkpoints") if path.name == LAST]
    state = json.loads((save / "state.json").read_text())
    state["config"]["cohort"]["embedding_dim"] = 9
    (save / "state.json").write_text(json.dumps(state))
    manifest = json.loads((save / "manifest.json").read_text())
    digest = hashlib.sha256((save / "state.json").read_bytes()).hexdigest()
    manifest["sha256"]["state.json"] = digest
    (save / "manifest.json").write_text(json.dumps(manifest))
    code, err = refused(capsys, str(run))
    assert code == 1
    assert "was saved as" in err


def test_other_bytes_at_the_same_place_are_not_overwritten(shared_run, tmp_path, capsys):
    words = ["--network", "0", "--output", str(tmp_path)]
    assert main(["export", str(shared_run), *words]) == 0
    before = files_of(tmp_path / "net-0")
    capsys.readouterr()
    code, err = refused(capsys, str(shared_run), *words, "--step", "2")
    assert code == 1
    assert f"{tmp_path / 'net-0'} is there and holds something else" in err
    assert files_of(tmp_path / "net-0") == before
    (tmp_path / "file").write_text("")
    code, err = refused(capsys, str(shared_run), "--output", str(tmp_path / "file"))
    assert code == 1
    assert f"{tmp_path / 'file/net-0'}: cannot be written" in err


def test_an_import_goes_on_to_detectron2(tmp_path, capsys):
    import torchvision

    torch.manual_seed(0)
    network = torchvision.models.resnet18()
    torch.save(network.state_dict(), tmp_path / "r18.pth")
    assert main(["import", str(tmp_path / "r18.pth"), "--output", str(tmp_path / "r18")]) == 0
    for given, output, place in (
        (tmp_path / "r18", (), tmp_path / "r18/net-0-detectron2"),
        (
            tmp_path / "r18/net-0",
            ("--output", str(tmp_path / "d2")),
            tmp_path / "d2/net-0-detectron2",
        ),
    ):
        assert main(["export", str(given), "--format", "detectron2", *output]) == 0
        arrays = pickle.loads((place / "model.pkl").read_bytes())["model"]
        expected = network.layer3[0].downsample[0].weight.detach().numpy()
        assert (arrays["res4.0.shortcut.weight"] == expected).all()
        assert f"MODEL.WEIGHTS {place / 'model.pkl'}" in capsys.readouterr().out
    assert "| layout | plain state dict |" in (place / "README.md").read_text()
    # timm's format is what an export is: copied where another place is asked for.
    assert main(["export", str(tmp_path / "r18/net-0"), "--output", str(tmp_path / "copy")]) == 0
    assert files_of(tmp_path / "copy/net-0") == files_of(tmp_path / "r18/net-0")
    config = json.loads((tmp_path / "copy/net-0/config.json").read_text())
    assert config["architecture"] == "resnet18"


def test_the_helps_show_an_example_without_waiting_for_torch():
    code = (
        "import sys; from peerlearn.cli import main; main(['export', '--help']); main(['import', '--help']);"
        "sys.exit('torch' in sys.modules)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    text = " ".join(found.stdout.split())
    assert "Example: peerlearn export runs/demo --format timm --network key-0" in text
    assert "Example: peerlearn import moco_v2.pth.tar" in text
