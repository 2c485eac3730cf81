"""The command for a GPU machine, in its smallest form: every part runs through, and leaves its figures."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow(90)
def test_every_part_leaves_figures_and_a_table_of_them(tmp_path: Path) -> None:
    subprocess.run(
        ["sh", "scripts/gpu_check.sh", str(tmp_path), "--small"],
        cwd=ROOT,
        env=os.environ | {"PYTHON": sys.executable},
        check=True,
    )
    found = json.loads((tmp_path / "gpu_check.json").read_text())
    parts = found["parts"]
    assert list(parts) == ["tests", "loss", "steps", "knn", "resume", "data_wait"]
    assert not [name for name, part in parts.items() if "failed" in part]
    rows = {name: part["rows"] for name, part in parts.items()}
    assert rows["tests"][0]["exit_code"] == 0
    losses = {row["rival"]: row for row in rows["loss"]}
    assert set(losses) == {
        "authors' way",
        "clean",
        "flat",
        "flat, tiles kept",
        "triton",
        "flat, fp16 queue",
        "triton, fp16 queue",
    }
    for name, row in losses.items():
        assert row["gradient_error"] < (1e-3 if "fp16" in name else 1e-5), name
    assert [row["M"] for row in rows["steps"]] == [1, 2]
    assert all(row["images_per_second"] > 0 for row in rows["steps"])
    # On a CPU a resumed run is equal to the bit.
    assert rows["resume"][0]["stopped"]
    assert rows["resume"][0]["equal_to_the_bit"] == rows["resume"][0]["tensors"] > 100
    assert rows["resume"][0]["largest_difference"] == 0
    assert 0 <= rows["data_wait"][0]["data_wait_percent"] <= 100
    page = (tmp_path / "gpu_check.md").read_text()
    for name in parts:
        assert f"## {name}" in page
    assert "| B | K | M | rival |" in page
    assert "**Failed**" not in page


def test_without_a_folder_it_tells_how_it_is_called() -> None:
    done = subprocess.run(
        ["sh", "scripts/gpu_check.sh"], cwd=ROOT, stderr=subprocess.PIPE, text=True, check=False
    )
    assert done.returncode == 2
    assert "sh scripts/gpu_check.sh OUT" in done.stderr
