"""The pages of measurements are those that the result files give."""

from pathlib import Path

from benchmarks import performance, scaling_page, ssl_study

ROOT = Path(__file__).parents[2]


def test_the_page_is_printed_from_the_results() -> None:
    """Red? Run `python -m benchmarks.performance > docs/performance.md`."""
    assert (ROOT / "docs/performance.md").read_text() == performance.page()


def test_the_page_of_the_study_is_printed_from_the_results() -> None:
    """Red? Run `python -m benchmarks.ssl_study > docs/study.md`."""
    assert (ROOT / "docs/study.md").read_text() == ssl_study.page()


def test_the_page_of_many_processes_is_printed_from_the_results() -> None:
    """Red? Run `python -m benchmarks.scaling_page > docs/scaling.md`."""
    assert (ROOT / "docs/scaling.md").read_text() == scaling_page.page()
