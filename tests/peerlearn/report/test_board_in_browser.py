"""`peerlearn board` in Chromium beside a training: what grows, what stays as the reader left it, what ends."""

import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from selenium import webdriver
from selenium.webdriver.common.by import By

from peerlearn.report.numbers import MISSING
from tests.e2e.runs import SMALL, command, environment
from tests.peerlearn.commands.test_runs_command import write_run
from tests.warm import Process

EVIL = "<script>alert(1)</script>"
CELLS = """
return [...document.querySelectorAll("#runs tbody tr")].map((row) => [...row.cells].map((cell) => cell.textContent));
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "runs"
    first = write_run(root / "old/00", [50.0])
    for number in range(1, 26):
        other = shutil.copytree(first, root / f"old/{number:02d}")
        config = (first / "config.yaml").read_text()
        (other / "config.yaml").write_text(config.replace("seed: 0", f"seed: {number}"))
    write_run(root / EVIL, [50.0], "FAILED")
    return root


@pytest.fixture
def training(folder: Path) -> Iterator[Process]:
    words = ["pretrain", *SMALL, "--epochs", "100", "--run", str(folder / "live")]
    process = Process(command(*words), env=environment(STEP_SECONDS="0.2"), stdout=subprocess.PIPE)
    yield process
    process.kill()
    process.communicate()


@pytest.fixture
def board(folder: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The process and the address that it prints."""
    process = subprocess.Popen(
        command("board", str(folder), "--port", "0"),
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdout is not None
    yield process, process.stdout.readline().strip()
    process.kill()
    process.communicate()


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.2)


def rows(page: webdriver.Chrome) -> dict[str, list[str]]:
    """The cells of the runs by their names, in the order in which they stand."""
    return {cells[0]: cells[1:] for cells in page.execute_script(CELLS)}


def step(page: webdriver.Chrome) -> int:
    return int(rows(page)["live"][1].replace(",", "").replace(MISSING, "0"))


@pytest.mark.slow(30)
def test_a_training_in_a_browser(board, folder, training, browser):
    process, address = board
    # Of the tests that had this browser before.
    browser.get_log("browser")
    browser.get(address)
    until(lambda: browser.current_url == address.partition("?")[0] and len(rows(browser)) >= 27)
    until(lambda: "live" in rows(browser))
    # What the reader does: order by name, from the last; scroll; mark the page.
    heading = "#runs thead th:first-child button"
    for _ in range(2):
        browser.find_element(By.CSS_SELECTOR, heading).click()
    browser.execute_script(
        "window.mark = 1; document.querySelector('#runs .scroll').scrollTop = 150;"
    )
    browser.execute_script("window.scrollTo({ top: 60, behavior: 'instant' });")
    place = browser.execute_script(
        "return [window.scrollY, document.querySelector('#runs .scroll').scrollTop];"
    )
    assert place[1] == 150
    # By itself.
    until(lambda: step(browser) > 0)
    before = step(browser)
    until(lambda: step(browser) > before)
    names = list(rows(browser))
    assert names == sorted(names, reverse=True)
    assert (
        browser.execute_script(
            "return [window.scrollY, document.querySelector('#runs .scroll').scrollTop];"
        )
        == place
    )
    assert rows(browser)["live"][0] == "running"
    # A run that comes later.
    write_run(folder / "later", [99.0])
    until(lambda: "later" in rows(browser))
    # A run that is killed.
    training.send_signal(signal.SIGKILL)
    until(lambda: rows(browser)["live"][0] != "running")
    assert re.fullmatch(
        r"dead: no sign of life since \d{4}-\d\d-\d\d \d\d:\d\d:\d\d UTC", rows(browser)["live"][0]
    )
    assert browser.execute_script("return window.mark;") == 1
    assert EVIL in rows(browser)
    assert browser.execute_script("return document.scripts.length;") == 1
    # Its page, by the link.
    browser.find_element(By.LINK_TEXT, EVIL).click()
    assert browser.find_element(By.TAG_NAME, "h1").text == EVIL
    assert browser.execute_script("return document.scripts.length;") == 1
    assert browser.get_log("browser") == []
    # Without its token: another browser.
    browser.delete_all_cookies()
    browser.get(address.partition("?")[0])
    assert "peerlearn board" in browser.find_element(By.TAG_NAME, "body").text
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 0


def test_ctrl_c_ends_it_with_nothing_but_its_address_printed(board):
    process, address = board
    assert re.fullmatch(r"http://127\.0\.0\.1:\d+/\?token=[\w-]{43}", address)
    process.send_signal(signal.SIGINT)
    assert [line[:4] for line in process.stdout] == ["From", "Ctrl"]
    assert process.wait(timeout=60) == 0
