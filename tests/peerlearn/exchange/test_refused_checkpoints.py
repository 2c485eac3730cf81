"""Files that are no checkpoint, hold more than plain data or are damaged: refused in one line, nothing run or left."""

import argparse
import collections
import io
import os
import pickle
import re
import subprocess
import sys
import tarfile
import types
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn
from torchvision.models.resnet import BasicBlock, Bottleneck

from peerlearn.cli import main
from tests.peerlearn.exchange.foreign_networks import (
    CifarResNet,
    State,
    WideResNet,
    assert_same_features,
    images,
    prefixed,
    resnet,
    small_moco,
)


class Harm:
    """What an attacker pickles: a call of os.system."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch {self.marker}",)


def zip_format(content: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def second_format(content: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, _use_new_zipfile_serialization=False)
    return buffer.getvalue()


def first_format(content: object) -> bytes:
    """A tar file, as PyTorch wrote before 0.1.10; no tensors."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:") as tar:
        parts = {
            "sys_info": pickle.dumps({"protocol_version": 1000}, protocol=2),
            "storages": pickle.dumps(0, protocol=2) + pickle.dumps([], protocol=2),
            "tensors": pickle.dumps(0, protocol=2),
            "pickle": pickle.dumps(content, protocol=2),
        }
        for name, part in parts.items():
            member = tarfile.TarInfo(name)
            member.size = len(part)
            tar.addfile(member, io.BytesIO(part))
    return buffer.getvalue()


CONTAINERS: dict[str, Callable[[object], bytes]] = {
    "zip": zip_format,
    "second": second_format,
    "tar": first_format,
    **{f"pickle-{p}": lambda content, p=p: pickle.dumps(content, p) for p in range(6)},
}


@pytest.mark.slow
def test_a_user_sees_one_line_of_it(tmp_path: Path) -> None:
    """In a process of its own, where PyTorch's warnings would show."""
    (tmp_path / "a.pth").write_bytes(pickle.dumps(Harm(tmp_path / "it_ran"), 4))
    done = subprocess.run(
        [sys.executable, "-m", "peerlearn", "import", str(tmp_path / "a.pth")],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    assert "would run code when loaded (posix.system): refused" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["a.pth"]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("place", ["alone", "beside", "inside", "optimizer"])
@pytest.mark.parametrize("container", CONTAINERS)
def test_a_file_that_would_run_code_is_refused_and_runs_nothing(
    container: str, place: str, import_file: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    marker = tmp_path / "it_ran"
    harm = Harm(marker)
    state = {"conv1.weight": 1.0}
    content = {
        "alone": harm,
        "beside": {"state_dict": state, "extra": harm},
        "inside": {"state_dict": {**state, "layer1.0.conv1.weight": harm}},
        "optimizer": {"state_dict": state, "optimizer": {"state": [harm], "param_groups": []}},
    }[place]
    planted = CONTAINERS[container](content)
    code, out, err = import_file(planted)
    assert not marker.exists()
    assert (code, out, err.count("\n")) == (1, "", 1)
    file = tmp_path / "moco.pth.tar"
    assert err.startswith(f"peerlearn: {file} would run code when loaded (posix.system): refused;")
    assert not (tmp_path / "out").exists()
    # The plant is alive: who trusts it is had.
    if container.startswith("pickle"):
        pickle.loads(planted)
    else:
        torch.load(file, weights_only=False)
    assert marker.exists()


@pytest.mark.parametrize("container", ["zip", "second"])
def test_data_of_other_classes_beside_the_weights_is_passed_over(
    container: str, import_file: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    """Scores of numpy's, a script's arguments, a framework's config: nothing of their classes is imported or called."""
    created: list[object] = []
    config = types.ModuleType("omegaconf.dictconfig")
    config.DictConfig = type(  # type: ignore[attr-defined]
        "DictConfig",
        (),
        {
            "__module__": "omegaconf.dictconfig",
            "__setstate__": lambda self, state: created.append(state),
        },
    )
    settings = config.DictConfig()
    settings._content = {"lr": 0.1}
    counts: Any = collections.defaultdict(list)
    counts["a"].append(1)
    network = resnet(seed=1)
    content = {
        "state_dict": network.state_dict(),
        "acc": np.float64(0.7),
        "best": np.arange(3),
        "args": argparse.Namespace(lr=0.1, out=Path("x")),
        "hyper_parameters": settings,
        "counts": counts,
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "omegaconf", types.ModuleType("omegaconf"))
        patch.setitem(sys.modules, "omegaconf.dictconfig", config)
        file = CONTAINERS[container](content)
        code, out, err = import_file(file)
    assert (code, err) == (0, "")
    assert not created
    assert "not read, beside the state dict: acc, args, best, counts, hyper_parameters\n" in out
    assert_same_features(tmp_path / "out/net-0", network, images())


def test_a_bare_pickle_of_more_than_plain_data_is_refused_by_its_names(
    import_file: Callable[..., tuple[int, str, str]],
) -> None:
    content = {"state_dict": {}, "args": argparse.Namespace(lr=0.1)}
    code, _, err = import_file(CONTAINERS["pickle-4"](content))
    assert (code, err.count("\n")) == (1, 1)
    assert re.search(
        r"holds more than tensors and plain values \(argparse\.Namespace\): refused;", err
    )


def test_a_whole_pickled_model_is_refused(import_file: Callable[..., tuple[int, str, str]]) -> None:
    code, _, err = import_file({"model": resnet()})
    assert (code, err.count("\n")) == (1, 1)
    assert re.search(
        r"would run code when loaded \(torch\.nn\.modules\..* and \d+ more\): refused;", err
    )
    assert "torch.save(model.state_dict(), ...)" in err


@pytest.mark.filterwarnings("ignore")
def test_a_torchscript_archive_is_refused(import_file: Callable[..., tuple[int, str, str]]) -> None:
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.script(nn.Linear(2, 2)), buffer)
    code, _, err = import_file(buffer.getvalue())
    assert (code, err.count("\n")) == (1, 1)
    assert "would run code when loaded (__torch__." in err


def truncated(container: Callable[[object], bytes], keep: float) -> bytes:
    content = container({"state_dict": {"conv1.weight": torch.randn(64, 3, 7, 7)}})
    return content[: int(keep * len(content))]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"hello, I am no checkpoint", "is no checkpoint that can be read safely"),
        (b"\x80", "is no checkpoint that can be read safely"),
        (b"PK\x03\x04 and no zip file", "is no checkpoint that can be read safely"),
        (truncated(zip_format, 0.5), "is no checkpoint that can be read safely"),
        (truncated(zip_format, 0.99), "is no checkpoint that can be read safely"),
        (truncated(second_format, 0.5), "is no checkpoint that can be read safely"),
        (truncated(second_format, 0.99), "is no checkpoint that can be read safely"),
        (first_format({"a": 1}), "is of PyTorch's first format, a tar file"),
        (zip_format([torch.zeros(3)]), "holds no state dict"),
        (zip_format({}), "holds no state dict"),
        (zip_format({"state_dict": {"epoch": 3}}), "holds no state dict"),
        (zip_format(torch.zeros(3)), "holds no state dict"),
    ],
    # The bytes themselves, which pytest would take for names, differ in every process.
    ids=[
        *("empty", "text", "one byte", "no zip file", "half of a zip file", "most of a zip file"),
        *("half of the second format", "most of the second format", "first format"),
        *("a list", "an empty dict", "no tensors", "a tensor"),
    ],
)
def test_what_is_no_checkpoint_is_one_line(
    content: bytes, message: str, import_file: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    code, out, err = import_file(content)
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert f"{tmp_path / 'moco.pth.tar'} {message}" in err
    assert not (tmp_path / "out").exists()


def test_a_broken_safetensors_file_is_one_line(
    import_file: Callable[..., tuple[int, str, str]],
) -> None:
    code, _, err = import_file(
        safetensors.torch.save({"a": torch.zeros(3)})[:-1], name="a.safetensors"
    )
    assert (code, err.count("\n")) == (1, 1)
    assert "a.safetensors is no checkpoint that can be read safely" in err


def test_a_folder_and_a_missing_file_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for file, message in (
        (tmp_path, "is a folder: give the checkpoint file in it"),
        (tmp_path / "none.pth", "cannot be read (No such file or directory)"),
    ):
        assert main(["import", str(file)]) == 1
        err = capsys.readouterr().err
        assert err.count("\n") == 1
        assert err.startswith(f"peerlearn: {file}")
        assert message in err


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (
            lambda: prefixed("", CifarResNet(Bottleneck, 5)),
            r"a ResNet of 5, 5, 5 bottleneck blocks on a 3x3 stem of 16 channels, which is none",
        ),
        (
            lambda: prefixed("module_list.0.", WideResNet(1, 1)),
            r"module_list\.0 is a wide ResNet of depth 10 and 16 channels in its first stage, which is none",
        ),
        (
            lambda: prefixed("", CifarResNet(BasicBlock, 2)),
            r"a ResNet of 2, 2, 2 basic blocks on a 3x3 stem of 16 channels, which is none",
        ),
        (
            lambda: {"module.base_encoder.cls_token": torch.zeros(1, 1, 8)},
            r"none of the networks that can be imported.* tensor is state_dict\.module\.base_encoder\.cls_token",
        ),
        (
            lambda: {"\x1b[2Jfeatures.0.weight": torch.zeros(3)},
            r"its first tensor is 'state_dict\.\\x1b\[2Jfeatures",
        ),
        (
            lambda: {**prefixed("", resnet()), "conv1.weight": torch.zeros(64)},
            r"conv1\.weight is \(64,\), not the weights of a convolution",
        ),
    ],
)
def test_other_networks_are_named_not_guessed(
    state: Callable[[], State],
    message: str,
    import_file: Callable[..., tuple[int, str, str]],
    tmp_path: Path,
) -> None:
    code, out, err = import_file({"state_dict": state()})
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert re.search(message, err), err
    assert not (tmp_path / "out").exists()


def spoil(state: State) -> Iterator[tuple[State, str]]:
    without = {k: v for k, v in state.items() if not k.startswith("encoder_q.layer3.1.bn")}
    yield (
        without,
        "encoder_q does not fit resnet18: 'layer3.1.bn1.weight' is missing, and 9 more; 110 of 120 tensors match",
    )
    extra = {**state, "encoder_q.layer1.0.se.weight": torch.zeros(3)}
    yield extra, "resnet18: 'layer1.0.se.weight' is not part of it; 120 of 120 tensors match"
    shape = {**state, "encoder_q.bn1.bias": torch.zeros(65)}
    yield shape, "'bn1.bias' is (65,), not (64,); 119 of 120 tensors match"
    counter = {k: v for k, v in state.items() if k != "encoder_q.bn1.num_batches_tracked"}
    yield counter, "'bn1.num_batches_tracked' is missing; 119 of 120 tensors match"
    quantised = {**state, "encoder_q.bn1.bias": torch.zeros(64, dtype=torch.int8)}
    yield quantised, "'bn1.bias' is torch.int8, torch.strided, not numbers of one plain tensor"
    sparse = {**state, "encoder_q.bn1.bias": torch.zeros(64).to_sparse()}
    yield sparse, "'bn1.bias' is torch.float32, torch.sparse_coo, not numbers of one plain tensor"
    for value in (float("nan"), float("inf")):
        poisoned = {k: v.clone() for k, v in state.items()}
        poisoned["encoder_q.layer4.0.bn2.running_var"][3] = value
        yield poisoned, "encoder_q: 'layer4.0.bn2.running_var' holds NaN or Inf: refused"


def test_what_float32_cannot_hold_is_refused(
    import_file: Callable[..., tuple[int, str, str]],
) -> None:
    state = {name: tensor.double() for name, tensor in resnet().state_dict().items()}
    state["bn1.weight"] *= 1e200
    code, _, err = import_file(state)
    assert (code, err.count("\n")) == (1, 1)
    assert "'bn1.weight' holds NaN or Inf: refused" in err


def test_a_flipped_byte_in_the_archive_is_found_by_its_checksum(
    import_file: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    torch.save(resnet().state_dict(), tmp_path / "whole.pth")
    content = bytearray((tmp_path / "whole.pth").read_bytes())
    content[len(content) // 2] ^= 0x40
    code, _, err = import_file(bytes(content))
    assert (code, err.count("\n")) == (1, 1)
    assert re.search(r"is damaged: the checksum of \S+ does not match; get it again", err)


def test_an_archive_that_unpacks_to_far_more_is_refused(
    import_file: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    torch.save({"conv1.weight": torch.zeros(2**22)}, tmp_path / "zeros.pth")
    packed = tmp_path / "packed.pth"
    with (
        zipfile.ZipFile(tmp_path / "zeros.pth") as plain,
        zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive,
    ):
        for record in plain.namelist():
            archive.writestr(record, plain.read(record))
    code, _, err = import_file(packed.read_bytes())
    assert (code, err.count("\n")) == (1, 1)
    assert "unpack to 16,77" in err


def test_a_stem_of_absurdly_many_channels_builds_no_network(
    import_file: Callable[..., tuple[int, str, str]],
) -> None:
    state = resnet().state_dict()
    state["conv1.weight"] = torch.zeros(1).expand(64, 100_000, 7, 7)
    code, _, err = import_file(state)
    assert (code, err.count("\n")) == (1, 1)
    assert "conv1.weight is of 100000 channels, more than 1024" in err


@pytest.mark.skipif(not hasattr(torch, "float8_e4m3fn"), reason="this torch has no float8")
def test_float8_is_read_and_nested_tensors_are_refused(
    import_file: Callable[..., tuple[int, str, str]],
) -> None:
    state = {
        name: tensor.to(torch.float8_e4m3fn) if tensor.is_floating_point() else tensor
        for name, tensor in resnet().state_dict().items()
    }
    code, _, err = import_file(state)
    assert (code, err) == (0, "")
    nested = torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)])
    code, _, err = import_file({**resnet().state_dict(), "conv1.weight": nested}, name="nested.pth")
    assert (code, err.count("\n")) == (1, 1)


def test_an_import_that_fails_midway_leaves_nothing(
    import_file: Callable[..., tuple[int, str, str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from peerlearn.exchange import import_command

    plain, saved = import_command._save, []

    def save_one(folder: Path, *rest: object) -> None:
        saved.append(folder)
        if len(saved) == 2:
            raise OSError(28, "No space left on device")
        plain(folder, *rest)

    monkeypatch.setattr(import_command, "_save", save_one)
    state = {**prefixed("encoder_q.", resnet(seed=1)), **prefixed("encoder_k.", resnet(seed=2))}
    code, _, err = import_file({"state_dict": state})
    assert (code, len(saved)) == (1, 2)
    assert "No space left on device" in err
    assert [path.name for path in tmp_path.iterdir()] == ["moco.pth.tar"]


def test_a_backbone_that_is_not_whole_is_refused(
    import_file: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    state = {**prefixed("encoder_q.", resnet(seed=1)), **prefixed("encoder_k.", resnet(seed=2))}
    for spoilt, message in spoil(state):
        code, out, err = import_file({"state_dict": spoilt})
        assert (code, out, err.count("\n")) == (1, "", 1)
        assert message in err
        assert not (tmp_path / "out").exists()


def test_a_misfit_in_the_last_network_writes_none(
    import_file: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    content, _, _ = small_moco()
    del content["state_dict"]["module.encoder_k.bn1.weight"]
    code, _, err = import_file(content)
    assert code == 1
    assert "encoder_k does not fit resnet18: 'bn1.weight' is missing" in err
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_written_is_named(
    import_file: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    (tmp_path / "out").write_text("in the way")
    code, _, err = import_file(resnet().state_dict())
    assert (code, err.count("\n")) == (1, 1)
    assert f"{tmp_path / 'out'} is there already: choose another folder by --output" in err


def test_torch_load_is_never_asked_for_more_than_weights(
    import_file: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[dict[str, Any]] = []
    real = torch.load

    def load(*arguments: Any, **options: Any) -> Any:
        asked.append(options)
        return real(*arguments, **options)

    monkeypatch.setattr(torch, "load", load)
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    assert import_file(resnet().state_dict())[0] == 0
    assert [options["weights_only"] for options in asked] == [True]


def test_the_help_shows_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["import", "--help"]) == 0
    assert "Example: peerlearn import moco_v2.pth.tar" in " ".join(capsys.readouterr().out.split())


def test_zip_members_of_any_name_are_searched(
    import_file: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    """torch.save names the folder in the archive after the file; a forger names it as he likes."""
    marker = tmp_path / "it_ran"
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("x/data.pkl", pickle.dumps(Harm(marker), 2))
        archive.writestr("x/version", "3\n")
        archive.writestr("x/byteorder", "little")
    code, _, err = import_file(buffer.getvalue())
    assert code == 1
    assert "would run code when loaded (posix.system)" in err
    assert not marker.exists()
