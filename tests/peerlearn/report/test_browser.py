"""Pages in Chromium: nothing fails, nothing is asked for, tables sort by keyboard, nothing of a user's runs."""

import json

import pytest
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

from peerlearn.cli import main
from peerlearn.report.page import render_page
from peerlearn.report.parts import Section, Table
from peerlearn.runs.notes import add_note
from tests.peerlearn.report.run_folders import make_run, measured, row, write_top1

SCRIPT = "<script>document.title='run'</script>"
EVIL = "\"><img src=x onerror=document.title='run'>" + SCRIPT
LONG = "mcl_x2_a_name_that_goes_on_" * 4
WIDTHS = (400, 1280)


@pytest.fixture
def show(browser):
    """Open a file at a width, in a theme; the log begins anew."""

    def open_page(file, *, width=1280, theme="light"):
        feature = {"name": "prefers-color-scheme", "value": theme}
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
        size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": False}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        browser.get_log("browser")
        browser.get_log("performance")
        browser.get(file.as_uri())
        return browser

    return open_page


def requested(browser):
    """The addresses that a page asked for, without what it holds itself."""
    messages = [json.loads(each["message"])["message"] for each in browser.get_log("performance")]
    urls = [
        each["params"]["request"]["url"]
        for each in messages
        if each["method"] == "Network.requestWillBeSent"
    ]
    return [url for url in urls if not url.startswith("data:")]


def evil_run(home):
    """A run that has markup wherever a user can put a text."""
    name = EVIL.replace("/", "\N{FRACTION SLASH}")
    rows = [row(step) | measured(step, 70.0) for step in (0, 50, 100)]
    rows[-1] |= {f"net/0/{EVIL}": 1.0, EVIL: 2.0}
    event = {"event": EVIL, "step": 3, "reason": EVIL}
    run = make_run(home / name, rows, events=[event], done=False, **{EVIL: EVIL, "method": EVIL})
    run.mark_failed(EVIL)
    run.env.write_text(json.dumps({EVIL: EVIL}))
    add_note(run.notes, EVIL, [SCRIPT.replace(" ", "")])
    file = write_top1(run, 71.0, dataset=EVIL, protocol={EVIL: EVIL}, variant=EVIL)
    file.with_suffix(".svg").write_text(f'<svg xmlns="http://www.w3.org/2000/svg">{SCRIPT}</svg>')
    return run


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The page of three runs whose names, config and results are long."""
    home = tmp_path_factory.mktemp("page")
    runs = [make_run(home / f"{LONG}{n}", seed=n, note=LONG) for n in range(3)]
    for run in runs:
        write_top1(run, 71.0, dataset=LONG)
    words = [str(run.root) for run in runs]
    assert main(["report", *words, "-o", str(home / "a.html"), "--no_images"]) == 0
    return home / "a.html"


def test_a_page_asks_for_nothing_and_nothing_fails(show, page):
    browser = show(page)
    assert browser.get_log("browser") == []
    assert requested(browser) == [page.as_uri()]
    titles = [each.text for each in browser.find_elements(By.CSS_SELECTOR, "main h2")]
    assert titles[:3] == ["Standing", "Scores", "Accuracy"]
    assert len(browser.find_elements(By.CSS_SELECTOR, "figure.picture svg")) >= 10


def test_what_a_user_has_written_is_text_and_never_runs(show, tmp_path):
    run = evil_run(tmp_path)
    assert main(["report", str(run.root), "-o", str(tmp_path / "a.html"), "--no_images"]) == 0
    browser = show(tmp_path / "a.html")
    assert browser.get_log("browser") == []
    assert requested(browser) == [(tmp_path / "a.html").as_uri()]
    assert browser.title.startswith("Run ")
    assert len(browser.find_elements(By.TAG_NAME, "script")) == 1
    assert {
        each.get_attribute("src")[:19] for each in browser.find_elements(By.TAG_NAME, "img")
    } == {"data:image/svg+xml;"}
    text = browser.find_element(By.TAG_NAME, "body").get_attribute("textContent")
    # The title, and in tables: the failure, a note, a config's key and value, an event and its facts.
    assert text.count("onerror=") > 8
    assert "Problems" not in text


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_nothing_is_wider_than_the_window(show, page, width, theme):
    browser = show(page, width=width, theme=theme)
    widths = "const page = document.documentElement; return [page.scrollWidth, page.clientWidth, innerWidth]"
    needed, there, window = browser.execute_script(widths)
    assert (needed, window) == (there, width)
    ground = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert ground == {"light": "rgb(255, 255, 255)", "dark": "rgb(20, 23, 27)"}[theme]
    assert all(ratio >= 4.5 for ratio in contrasts(browser))


def contrasts(browser):
    """The contrast of each kind of text with the ground behind it, after WCAG 2."""
    pairs = browser.execute_script("""
        const shown = (element, name) => getComputedStyle(element)[name];
        return [...document.querySelectorAll("h1, h2, p, td, th, figcaption, summary, a, svg text")].map((each) => {
          let ground = each;
          while (shown(ground, "backgroundColor") === "rgba(0, 0, 0, 0)" && ground.parentElement)
            ground = ground.parentElement;
          const svg = each.namespaceURI.endsWith("svg");
          return [shown(each, svg ? "fill" : "color"), shown(ground, "backgroundColor")];
        });""")
    return [contrast(*pair) for pair in {tuple(pair) for pair in pairs}]


def contrast(text, ground):
    low, high = sorted(map(luminance, (text, ground)))
    return (high + 0.05) / (low + 0.05)


def luminance(color):
    shares = [int(each) / 255 for each in color[color.index("(") + 1 : -1].split(",")[:3]]
    red, green, blue = (
        share / 12.92 if share <= 0.04045 else ((share + 0.055) / 1.055) ** 2.4 for share in shares
    )
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def column(browser, number):
    cells = browser.find_elements(By.CSS_SELECTOR, f"tbody tr > :nth-child({number})")
    return [cell.text for cell in cells]


def test_a_table_is_sorted_by_keyboard(show, tmp_path):
    rows = (
        ("b", 9.5),
        ("a", None),
        ("net 10", -1.0),
        ("net 9", 100.25),
        ("d", float("nan")),
        ("e", 9.5),
    )
    table = Table(caption="Scores", headings=("run", "top-1"), rows=rows)
    file = tmp_path / "a.html"
    file.write_text(render_page("T", [Section(anchor="s", title="Scores", parts=(table,))]))
    browser = show(file)
    written = ["b", "a", "net 10", "net 9", "d", "e"]
    assert column(browser, 1) == written
    # The skip link, the contents, the box of the table, then the heading of each column.
    keys = browser.switch_to.active_element
    for _ in range(5):
        keys.send_keys(Keys.TAB)
        keys = browser.switch_to.active_element
    assert (keys.tag_name, keys.text) == ("button", "top-1")

    def sorted_by():
        headings = browser.find_elements(By.CSS_SELECTOR, "thead th")
        return [each.get_attribute("aria-sort") for each in headings]

    assert sorted_by() == [None, None]
    keys.send_keys(Keys.ENTER)
    assert sorted_by() == [None, "ascending"]
    # Equal numbers stay as they were; what is no number, and then what is missing, comes last.
    assert column(browser, 1) == ["net 10", "b", "e", "net 9", "d", "a"]
    keys.send_keys(Keys.SPACE)
    assert sorted_by() == [None, "descending"]
    assert column(browser, 1) == ["d", "net 9", "b", "e", "net 10", "a"]
    keys.send_keys(Keys.ENTER)
    assert sorted_by() == [None, None]
    assert column(browser, 1) == written
    browser.find_elements(By.CSS_SELECTOR, "th button")[0].send_keys(Keys.ENTER)
    assert sorted_by() == ["ascending", None]
    assert column(browser, 1) == ["a", "b", "d", "e", "net 9", "net 10"]


def test_the_page_reads_without_its_script(show, page):
    show(page).execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    try:
        browser = show(page)
        assert browser.find_elements(By.TAG_NAME, "button") == []
        assert browser.find_element(By.CSS_SELECTOR, "#standing th").is_displayed()
        browser.find_element(By.CSS_SELECTOR, ".picture summary").click()
        assert browser.find_element(By.CSS_SELECTOR, ".picture td").is_displayed()
    finally:
        browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})


def test_headings_are_in_order_and_what_is_referred_to_is_there(show, page):
    browser = show(page)
    found = browser.execute_script("""
        const ids = [...document.querySelectorAll("[id]")].map((each) => each.id);
        const uses = [...document.querySelectorAll("use")].map((each) => each.getAttribute("xlink:href").slice(1));
        const links = [...document.querySelectorAll("a")].map((each) => each.getAttribute("href").slice(1));
        const labelled = [...document.querySelectorAll("[aria-labelledby]")];
        const labels = labelled.map((each) => each.getAttribute("aria-labelledby"));
        const levels = [...document.querySelectorAll("h1, h2, h3, h4")].map((each) => Number(each.tagName[1]));
        return {ids, referred: [...uses, ...links, ...labels], levels};""")
    assert len(found["ids"]) == len({*found["ids"]})
    assert {*found["referred"]} <= {*found["ids"]}
    assert found["levels"] == [1] + [2] * (len(found["levels"]) - 1)
    for tag in ("header", "nav", "main"):
        assert len(browser.find_elements(By.TAG_NAME, tag)) == 1
