"""Numbers as people read them; what is not there is a dash."""

from __future__ import annotations

from typing import Any

DASH = "–"
MINUS = "−"


def whole(value: float | None) -> str:
    return DASH if value is None else f"{value:,.0f}".replace("-", MINUS)


def percent(value: float | None) -> str:
    """A share as a percentage, with one digit after the point."""
    return DASH if value is None else f"{_rounded(100 * value, 1)}\u00a0%"


def points(value: float | None) -> str:
    """A difference of shares in percentage points, with its sign."""
    if value is None:
        return DASH
    text = _rounded(100 * value, 1)
    return text if text == "0.0" or text.startswith(MINUS) else f"+{text}"


def interval(low: float | None, high: float | None, shown: Any = percent) -> str:
    """[low, high], a dash where there is none."""
    return DASH if low is None or high is None else f"[{shown(low)}, {shown(high)}]".replace("\u00a0%, ", ", ")


def small(value: float | None, *, digits: int = 2, sign: bool = False) -> str:
    """A number of any size with so many significant digits, and its sign where it is a difference."""
    if value is None:
        return DASH
    return f"{value:{'+' if sign and value else ''}.{digits}g}".replace("-", MINUS)


def size(count: float | None) -> str:
    """Bytes with three digits or so."""
    if count is None:
        return DASH
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:.0f} {unit}" if unit == "B" or count >= 99.95 else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def duration(seconds: float | None) -> str:
    """Seconds, or what part of one fits."""
    if seconds is None:
        return DASH
    if seconds == 0 or seconds >= 0.9995:
        return f"{seconds:,.0f} s" if seconds >= 99.95 or seconds == 0 else f"{seconds:.1f} s"
    return f"{1e3 * seconds:.1f} ms" if seconds >= 0.0009995 else f"{1e6 * seconds:.0f} µs"


def anything(value: Any) -> str:
    """A value of an unknown column."""
    if value is None:
        return DASH
    if isinstance(value, list):
        return ", ".join(map(anything, value))
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4g}".replace("-", MINUS)


def listed(words: list[str], last: str = "and") -> str:
    """`a, b and c`."""
    return f"{', '.join(words[:-1])} {last} {words[-1]}" if len(words) > 1 else "".join(words)


def _rounded(value: float, digits: int) -> str:
    text = f"{value:.{digits}f}"
    return text.removeprefix("-") if float(text) == 0 else text.replace("-", MINUS)
