"""Pictures for the notebook, as SVG, in the colours of the page."""

import re
from math import log10
from pathlib import Path

from IPython.display import HTML

HERE = Path(__file__).with_name("svg")
LOOKS = (
    ("#d0473d", 2, 1),
    ("#0b8791", 7, 0.4),
    ("#2e9e5b", 2, 1),
)  # colour, width, opacity


def show(name: str) -> HTML:
    """Return a picture. Without its card, the README's one has the page's colours."""
    drawing = (HERE / f"{name}.svg").read_text("utf-8")
    return HTML(re.sub("<style>.*?</style>|<rect class=.card.*?/>", "", drawing))


def waiting(**curves: list[float]) -> HTML:
    """Plot how many KiB wait for a reader, after each message, on a scale of powers."""
    longest = max([1, *map(len, curves.values())])

    def place(number: int, kibibytes: float) -> tuple[float, float]:
        up = min(4.2, log10(1 + kibibytes)) / 4.2
        return round(86 + 500 * number / longest, 1), round(180 - 160 * up, 1)

    shapes, row = [], 40
    for power in range(5):
        _, y = place(0, 10**power)
        shapes.append(
            f"<path d='M86 {y} h500' stroke='currentColor' stroke-opacity='.2'/>"
        )
        shapes.append(text(78, y + 4, f"{10**power:,} KiB", "end"))
    for (name, curve), look in zip(curves.items(), LOOKS, strict=False):
        style = "fill='none' stroke='{}' stroke-width='{}' stroke-opacity='{}'".format(
            *look
        )
        points = " ".join("{},{}".format(*place(*point)) for point in enumerate(curve))
        shapes.append(f"<polyline points='{points}' {style}/>")
        shapes.append(f"<path d='M600 {row - 4} h20' {style}/>")
        shapes.append(text(628, row, name.replace("_", " ")))
        row += 24
    shapes.append(text(336, 204, "messages of 10,000 characters", "middle"))
    start = "<svg viewBox='0 0 720 212' width='720' role='img' font-size='13'"
    start += " aria-label='What waits for Bob in the server' fill='currentColor'"
    return HTML(f"{start} style='max-width:100%;height:auto'>{''.join(shapes)}</svg>")


def text(x: float, y: float, words: str, anchor: str = "start") -> str:
    return f"<text x='{x}' y='{y}' text-anchor='{anchor}'>{words}</text>"
