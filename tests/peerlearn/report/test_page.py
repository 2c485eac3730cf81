"""The HTML of a page: what is escaped, what a browser lets it do, how cells become text."""

import base64
import hashlib
import re
from html.parser import HTMLParser

import pytest
from markupsafe import Markup

from peerlearn.report.numbers import column_texts
from peerlearn.report.page import render_page
from peerlearn.report.parts import Paragraph, Picture, Section, Table

EVIL = '"><script>alert(1)</script><img src=x onerror=alert(2)>{{ 7*7 }}'
TABLE = Table(caption="Scores", headings=("run", "top-1 (%)"), rows=(("a", 62.314), ("b", None)))
PICTURE = Picture(image=Markup("<svg></svg>"), caption="A curve", alternative="It falls")


def page(*parts, **words):
    return render_page("Title", [Section(anchor="s", title="Scores", parts=parts)], **words)


class Elements(HTMLParser):
    """The elements of a page with their attributes, and all the text between them."""

    def __init__(self, html):
        super().__init__()
        self.found, self.text = [], ""
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data

    def of(self, tag):
        return [attributes for name, attributes in self.found if name == tag]


def test_every_text_is_escaped():
    table = Table(caption=EVIL, headings=(EVIL, "n"), rows=((EVIL, 1),), is_folded=True)
    picture = Picture(image=Markup("<svg></svg>"), caption=EVIL, alternative=EVIL, numbers=table)
    section = Section(anchor="s", title=EVIL, parts=(Paragraph(text=EVIL), table, picture))
    found = Elements(render_page(EVIL, [section]))
    assert len(found.of("script")) == 1
    assert not found.of("img")
    assert [each["aria-label"] for each in found.of("div") if each.get("role") == "img"] == [EVIL]
    # The title twice, the section twice, a paragraph, and of the table, twice, caption, summary, heading and cell;
    # the picture's caption.
    assert found.text.count(EVIL) == 2 + 2 + 1 + 2 * 4 + 1


@pytest.mark.parametrize("live", [False, True])
def test_the_policy_names_the_script_that_stands_there(live):
    html = page(TABLE, live=live)
    script = re.search("<script>(.*)</script>", html, re.DOTALL)[1]
    (policy,) = [
        each["content"]
        for each in Elements(html).of("meta")
        if each.get("http-equiv") == "Content-Security-Policy"
    ]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert policy.startswith("default-src 'none'; ")
    assert f"script-src 'sha256-{digest}'" in policy
    assert ("connect-src 'self'" in policy) is live
    assert ("fetch(" in script) is live


def test_equal_input_gives_an_equal_page():
    assert page(TABLE, PICTURE) == page(TABLE, PICTURE)


def test_a_section_without_parts_is_left_out():
    assert 'id="s"' in page(TABLE)
    assert 'id="s"' not in page()


def test_consecutive_pictures_stand_in_one_box():
    assert page(PICTURE, PICTURE, TABLE, PICTURE).count('<div class="pictures">') == 2


def test_a_byte_that_is_no_text_is_escaped():
    page(Paragraph(text="run-\udcfc")).encode()


@pytest.mark.parametrize(
    ("values", "texts"),
    [
        ([62.314, None, -0.5], ["62.31", "\N{EN DASH}", "\N{MINUS SIGN}0.50"]),
        ([0.03, 2.13e-6], ["0.03", "2.13e-06"]),
        ([1200, 7], ["1,200", "7"]),
        ([float("nan"), float("inf"), 1.0, -0.0], ["NaN", "inf", "1.00", "0.00"]),
        (["a", 1.0], ["a", "1.00"]),
    ],
)
def test_numbers_of_a_column(values, texts):
    assert column_texts(values) == texts
