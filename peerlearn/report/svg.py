"""Numbers and text as SVG markup."""

from markupsafe import Markup

from peerlearn.runs.text import printable

_LONGEST_TEXT = 16


def svg_number(value: float, decimals: int = 1) -> str:
    """A number with at most so many decimals: ``3``, ``0.5``, never ``-0``."""
    text = f"{value:z.{decimals}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def svg_text(x: float, y: float, text: str, anchor: str = "start") -> str:
    """The element `text`; the middle of a long text is left out.

    Args:
        x: position of the anchor.
        y: position of the base line.
        text: any text; it is escaped.
        anchor: what lies at the position: start, middle or end.
    """
    where = f'x="{svg_number(x)}" y="{svg_number(y)}" text-anchor="{anchor}"'
    return f"<text {where}>{Markup.escape(printable(text, _LONGEST_TEXT))}</text>"
