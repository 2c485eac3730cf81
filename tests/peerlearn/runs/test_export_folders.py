"""Which networks a folder of exports holds, by names and files alone."""

import json
from pathlib import Path

import pytest

from peerlearn.runs.export_folders import (
    CONFIG_FILE,
    SEAL,
    WEIGHTS_FILE,
    exported_networks,
    is_export,
    is_key_network,
    network_folder,
    network_in,
    read_seal,
)


def lay_out(folder: Path, config: object) -> Path:
    folder.mkdir(parents=True)
    (folder / WEIGHTS_FILE).write_bytes(b"weights")
    (folder / CONFIG_FILE).write_text(json.dumps(config))
    return folder


def test_a_network_and_its_folder_name_each_other():
    for network, folder in (("0", "net-0"), ("12", "net-12"), ("key-3", "net-3-key")):
        assert network_folder(network) == folder
        assert network_in(folder) == network
        assert is_key_network(network) == folder.endswith("-key")
    for folder in ("net-", "net-a", "net-0-timm", ".net-0.tmp", "net-0-key-torchvision"):
        assert network_in(folder) is None


def test_networks_come_in_order_and_others_do_not_count(tmp_path: Path):
    names = ["key-1", "10", "2", "key-0", "0"]
    for name in names:
        lay_out(tmp_path / network_folder(name), {})
    lay_out(tmp_path / "net-0-torchvision", {})
    (tmp_path / "net-3").mkdir()
    assert list(exported_networks(tmp_path)) == ["0", "2", "10", "key-0", "key-1"]


@pytest.mark.parametrize("config", [{}, [], None, {SEAL: None}, {SEAL: "text"}])
def test_an_export_without_seal_is_one_of_another_program(tmp_path: Path, config):
    folder = lay_out(tmp_path / "net-0", config)
    assert is_export(folder)
    assert read_seal(folder) is None


def test_the_seal_is_read_where_the_weights_are(tmp_path: Path):
    hashes = {WEIGHTS_FILE: "1", CONFIG_FILE: "2"}
    folder = lay_out(tmp_path / "net-0", {SEAL: hashes})
    assert read_seal(folder) == hashes
    (folder / WEIGHTS_FILE).unlink()
    assert read_seal(folder) is None
    assert read_seal(tmp_path / "net-1") is None
