"""Plain SVG that can be read on light and dark pages."""

import math
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path

_STYLE = """
svg { --ink: #1f2328; --soft: #59636e; --rule: #d8dee4; --page: #ffffff;
      --a: #1f6feb; --b: #c4610a; --c: #1a7f5a; --floor: #8c959f; }
@media (prefers-color-scheme: dark) {
  svg { --ink: #e6edf3; --soft: #9da7b1; --rule: #30363d; --page: #0d1117;
        --a: #58a6ff; --b: #f0a04b; --c: #4fc79a; --floor: #7d8590; }
}
text { font: 12px system-ui, -apple-system, "Segoe UI", Helvetica, Arial, sans-serif; fill: var(--ink); }
.title { font-size: 15px; font-weight: 600; }
.soft { fill: var(--soft); font-size: 11px; }
"""


class Drawing:
    """Collects shapes; colours are the names ink, soft, rule, a, b, c, floor."""

    def __init__(self, width: int, height: int, title: str, subtitle: str) -> None:
        self._size = (width, height)
        self._title = title
        self._parts: list[str] = []
        self.text(16, 26, title, kind="title")
        self.text(16, 44, subtitle, kind="soft")

    def text(self, x: float, y: float, text: str, *, kind: str = "plain", anchor: str = "start") -> None:
        """Write a line; y is its base line."""
        self._parts.append(f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" class="{kind}">{escape(text)}</text>')

    def line(self, points: Sequence[tuple[float, float]], colour: str, *, width: float = 1, dash: str = "") -> None:
        """Draw a line through points."""
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        dashes = f' stroke-dasharray="{dash}"' if dash else ""
        self._parts.append(
            f'<polyline points="{path}" fill="none" style="stroke:var(--{colour})" stroke-width="{width}"{dashes}/>'
        )

    def dot(self, x: float, y: float, colour: str, *, radius: float = 5) -> None:
        """Draw a filled circle."""
        self._parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius}" style="fill:var(--{colour})"/>')

    def bar(self, x: float, y: float, width: float, height: float, colour: str) -> None:
        """Draw a filled rectangle."""
        self._parts.append(
            f'<rect x="{x:.1f}" y="{y:.1f}" width="{max(width, 0.5):.1f}" height="{height:.1f}" rx="2" '
            f'style="fill:var(--{colour})"/>'
        )

    def legend(self, x: float, y: float, entries: Sequence[tuple[str, str, str]]) -> None:
        """Explain colours: mark ("dot", "bar", "dash"), colour, text."""
        for mark, colour, text in entries:
            if mark == "dash":
                self.line([(x, y - 4), (x + 14, y - 4)], colour, width=2, dash="4 3")
            elif mark == "tick":
                self.line([(x + 7, y - 10), (x + 7, y + 2)], colour, width=3)
            elif mark == "bar":
                self.bar(x, y - 9, 14, 10, colour)
            else:
                self.dot(x + 7, y - 4, colour)
            self.text(x + 20, y, text, kind="soft")
            x += 34 + 6.2 * len(text)

    def save(self, file: Path) -> None:
        """Write the file."""
        width, height = self._size
        head = (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
            f'height="{height}" role="img" aria-label="{escape(self._title)}">'
        )
        page = f'<rect width="{width}" height="{height}" rx="6" style="fill:var(--page)"/>'
        file.parent.mkdir(parents=True, exist_ok=True)
        body = "\n".join([head, f"<style>{_STYLE}</style>", page, *self._parts, "</svg>", ""])
        file.write_text(body, encoding="utf-8")


def log_scale(low: float, high: float, start: float, end: float) -> Callable[[float], float]:
    """Return the place of a value on a logarithmic axis from `start` to `end`."""
    span = math.log(high / low) or 1.0
    return lambda value: start + (end - start) * math.log(max(value, low) / low) / span


def log_ticks(low: float, high: float) -> list[float]:
    """Return 1, 2, 5, 10, ... from at most `low` to at least `high`; only powers of ten on long axes."""
    steps = (1, 2, 5) if high / low < 3000 else (1,)
    every = [step * 10.0**power for power in range(-4, 8) for step in steps]
    first = max((tick for tick in every if tick <= low), default=every[0])
    last = min((tick for tick in every if tick >= high and tick > first), default=every[-1])
    return [tick for tick in every if first <= tick <= last]


def linear_ticks(high: float) -> list[float]:
    """Return 0 and about five further round values, the last at least `high`."""
    step = next(s * 10.0**p for p in range(-3, 8) for s in (1, 2, 5) if s * 10.0**p * 6 >= high)
    return [step * i for i in range(math.ceil(high / step) + 1)]
