"""The page of measured speed is the one that the result files give."""

from pathlib import Path

from benchmarks.performance import page

ROOT = Path(__file__).parents[2]


def test_the_page_is_printed_from_the_results() -> None:
    """Red? Run `python -m benchmarks.performance > docs/performance.md`."""
    assert (ROOT / "docs/performance.md").read_text() == page()
