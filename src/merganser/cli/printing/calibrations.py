"""What a calibration will take, as lines."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ...wording import digits_text, plural, size_text, some, time_text

if TYPE_CHECKING:
    from ...statistics import CalibrationPlan

_UNITS = ((1e18, "exa"), (1e15, "peta"), (1e12, "tera"), (1e9, "giga"))


def calibration_rows(plans: Sequence[CalibrationPlan]) -> list[list[str]]:
    """Return rows for a table: for each calibration its data, then its costs."""
    rows: list[list[str]] = []
    for own in plans:
        counted = "" if own.counted == own.tokens else f", {own.counted:,} of them count"
        rows.append(
            [
                own.name,
                f"{plural(own.sequences, 'sequence')} of {some(own.data)}, {plural(own.tokens, 'token')}{counted}",
            ]
        )
        if own.present:
            rows.append(["", f"{', '.join(own.statistics)}: there already"])
            continue
        if own.steps:
            rows.append(["", f"{plural(own.steps, 'step')} of gradient descent through the whole merged model"])
        rows.append(["", f"{', '.join(own.statistics)}: {size_text(own.statistics_bytes)}, {_spool(own)}"])
        rows.append(["", _costs(own)])
    working = [own for own in plans if not own.present]
    if len(working) > 1:
        rows.append(["together", _time(sum(own.seconds for own in working))])
    return rows


def _spool(own: CalibrationPlan) -> str:
    return f"and {size_text(own.spool_bytes)} of disk for hidden states meanwhile"


def _costs(own: CalibrationPlan) -> str:
    work = _operations(own.forward_operations + own.sum_operations)
    return f"reads {size_text(own.bytes_read)}, {work}, peak memory about {size_text(own.peak_memory)}, {_time(own.seconds)}"


def _time(seconds: float) -> str:
    return f"about {time_text(max(1, round(seconds)))} at the speed of a short measurement here"


def _operations(count: float) -> str:
    """Return a number of floating-point operations: `3.8 TFLOP`."""
    unit, name = next(((unit, name) for unit, name in _UNITS if count >= unit), _UNITS[-1])
    return f"{digits_text(count / unit)} {name[0].upper()}FLOP"
