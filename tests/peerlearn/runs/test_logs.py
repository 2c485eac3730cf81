"""The log file of a rank: what is lost where it cannot be written."""

import logging
import shutil
from pathlib import Path

import pytest

from peerlearn.runs.logs import log_to


@pytest.fixture(autouse=True)
def _handlers_as_before():
    before = list(logging.getLogger().handlers)
    yield
    logging.getLogger().handlers = before


def test_a_library_that_configures_logging_costs_no_line_and_no_run(tmp_path: Path):
    """It closes every file. The next line opens it again, unless its folder is gone."""
    logger = logging.getLogger("test")
    logger.setLevel(logging.INFO)
    folder = tmp_path / "attempt-1"
    folder.mkdir()
    log_to(folder / "rank-0.log")
    logger.info("before")
    logging.shutdown(logging._handlerList[:])
    logger.info("after")
    text = (folder / "rank-0.log").read_text()
    assert "INFO test: before\n" in text
    assert text.endswith("INFO test: after\n")
    logging.shutdown(logging._handlerList[:])
    shutil.rmtree(folder)
    logger.info("nowhere")
    assert not folder.exists()
