"""What the tests of `peerlearn import` share."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from peerlearn.cli import main


@pytest.fixture
def import_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """Write content to a file and run `peerlearn import` on it: exit code, stdout, stderr."""

    def run(content: object, *words: str, name: str = "moco.pth.tar") -> tuple[int, str, str]:
        file = tmp_path / name
        if isinstance(content, bytes):
            file.write_bytes(content)
        elif content is not None:
            torch.save(content, file)
        code = main(["import", str(file), "--output", str(tmp_path / "out"), *words])
        found = capsys.readouterr()
        return code, found.out, found.err

    return run
