"""What the tests of pages share: a browser without a window."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from selenium import webdriver
from selenium.webdriver.chrome.service import Service

CHROMIUM, DRIVER = Path("/usr/bin/chromium"), Path("/usr/bin/chromedriver")


@pytest.fixture(scope="session")
def browser() -> Iterator[webdriver.Chrome]:
    """Chromium without a window, at its own size and with a light page; it logs what pages ask for and what fails."""
    missing = [str(file) for file in (CHROMIUM, DRIVER) if shutil.which(file) is None]
    if missing:
        pytest.skip(f"{', '.join(missing)} not installed: sh scripts/system_packages.sh")
    options = webdriver.ChromeOptions()
    options.binary_location = str(CHROMIUM)
    # As root it runs without its sandbox alone; /dev/shm may be small.
    for word in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage"):
        options.add_argument(word)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    # By its path: the library would else look for a driver in the network.
    driver = webdriver.Chrome(options=options, service=Service(str(DRIVER)))
    try:
        yield driver
    finally:
        driver.quit()
