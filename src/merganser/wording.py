"""Numbers and lists as people read them."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["count_text", "number_text", "plural", "size_text", "some", "time_text"]


def size_text(count: float) -> str:
    """Write a number of bytes: `1.08 GB`."""
    return _scaled(count, ("bytes", "KB", "MB", "GB", "TB"))


def count_text(count: float) -> str:
    """Write a number of things: `4,096`, `494 M`."""
    return f"{count:,.0f}" if count < 10_000 else _scaled(count, ("", "K", "M", "B", "T"))


def _scaled(count: float, units: Sequence[str]) -> str:
    if count < 1000:
        return f"{count:.0f} {units[0]}"
    for unit in units[1:]:
        count /= 1000
        if count < 999.5 or unit == units[-1]:
            break
    return f"{count:.{2 if count < 9.995 else 1 if count < 99.95 else 0}f} {unit}"


def time_text(seconds: float) -> str:
    """Write a duration: `7.2 s`, `2 min 10 s`, `1 h 5 min`."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def plural(count: int, thing: str) -> str:
    """Write `1 file`, `2 files`, `12,345 tensors`."""
    return f"{count:,} {thing}{'' if count == 1 else 's'}"


def number_text(value: float | None) -> str:
    """Write a measured number with three digits, `-` where there is none."""
    if value is None:
        return "-"
    return f"{value:.3g}"


def some(names: Sequence[str], limit: int = 4) -> str:
    """List names, the first few of many."""
    shown = ", ".join(names[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"
