"""Pictures of the chat, drawn as SVG: no file, no network, and the colours of the page.

python -m workshop.pictures docs/one-message.svg
"""

import sys
from html import escape
from math import atan2, cos, sin
from pathlib import Path

ACCENT, GOOD, BAD = "#0b8791", "#2e9e5b", "#d0473d"
FONT = "font-family='system-ui, sans-serif' font-size='14'"
LANE, ROW, TOP = 190, 34, 54


def svg(width: int, height: int, title: str, parts: list[str], style="") -> str:
    return (
        f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {width} {height}' "
        f"width='{width}' role='img' aria-label='{escape(title)}' {FONT} "
        f"fill='currentColor' style='max-width:100%;height:auto'>"
        f"<title>{escape(title)}</title>{style}{''.join(parts)}</svg>"
    )


def text(x, y, words, anchor="middle", more="") -> str:
    return f"<text x='{x}' y='{y}' text-anchor='{anchor}' {more}>{escape(words)}</text>"


def box(x, y, width, height, words) -> str:
    lines = words.split("\n")
    start = y + height / 2 + 5 - 9 * (len(lines) - 1)
    labels = [text(x + width / 2, start + 18 * n, line) for n, line in enumerate(lines)]
    return (
        f"<rect x='{x}' y='{y}' width='{width}' height='{height}' rx='7' "
        f"fill='{ACCENT}' fill-opacity='.14' stroke='{ACCENT}'/>{''.join(labels)}"
    )


def arrow(x1, y1, x2, y2, colour=ACCENT, dashed=False) -> str:
    """Draw a line with a head. (Markers have ids, which would clash in a notebook.)"""
    angle = atan2(y2 - y1, x2 - x1)
    points = " ".join(
        f"{x2 - 9 * cos(angle + turn):.1f},{y2 - 9 * sin(angle + turn):.1f}"
        for turn in (0.4, -0.4)
    )
    dash = "stroke-dasharray='5 4'" if dashed else ""
    return (
        f"<line x1='{x1}' y1='{y1}' x2='{x2}' y2='{y2}' stroke='{colour}' "
        f"stroke-width='1.6' {dash}/>"
        f"<polygon points='{x2},{y2} {points}' fill='{colour}'/>"
    )


class Sequence:
    """A sequence diagram: who says what to whom, from top to bottom."""

    def __init__(self, title: str, *lanes: str) -> None:
        self.title, self.lanes, self.parts, self.y = title, lanes, [], TOP

    def x(self, lane: str) -> float:
        return LANE * (self.lanes.index(lane) + 0.5)

    def say(
        self, start, end, words, colour=ACCENT, dashed=False, lost=False, same=False
    ):
        """Draw an arrow with its words above it; one that is lost ends halfway."""
        self.y += 0 if same else ROW
        x1, x2 = self.x(start), self.x(end)
        if lost:
            x2, colour = x1 + (x2 - x1) * 0.62, BAD
            for turn in (-1, 1):
                self.parts.append(
                    f"<line x1='{x2 - 6}' x2='{x2 + 6}' y1='{self.y - 6 * turn}' "
                    f"y2='{self.y + 6 * turn}' stroke='{BAD}' stroke-width='2.4'/>"
                )
        gap = 7 if x2 > x1 else -7
        self.parts.append(
            arrow(x1 + gap, self.y, x2 - gap, self.y, colour, dashed)
            if not lost
            else f"<line x1='{x1 + gap}' x2='{x2}' y1='{self.y}' y2='{self.y}' "
            f"stroke='{BAD}' stroke-width='1.6' stroke-dasharray='5 4'/>"
        )
        middle = self.x(start) + (self.x(end) - self.x(start)) * (0.3 if lost else 0.5)
        self.parts.append(text(middle, self.y - 6, words, more="font-size='13'"))
        return self

    def note(self, lane: str, words: str, colour=GOOD):
        """Write what happens at one of them, in a small box."""
        self.y += ROW
        width = 8.2 * len(words) + 16
        x = self.x(lane) - width / 2
        self.parts.append(
            f"<rect x='{x}' y='{self.y - 19}' width='{width}' height='25' rx='5' "
            f"fill='{colour}' fill-opacity='.16' stroke='{colour}'/>"
            + text(self.x(lane), self.y - 2, words, more="font-size='13'")
        )
        return self

    def draw(self, style: str = "") -> str:
        height, parts = self.y + 30, []
        for lane in self.lanes:
            x = self.x(lane)
            parts.append(
                f"<line x1='{x}' x2='{x}' y1='38' y2='{height - 8}' "
                "stroke='currentColor' stroke-opacity='.3'/>"
            )
            parts.append(box(x - 72, 8, 144, 30, lane))
        width = LANE * len(self.lanes)
        return svg(width, height, self.title, parts + self.parts, style)

    def _repr_html_(self) -> str:
        return self.draw()


def one_message() -> Sequence:
    lanes = "Ann's page", "process A", "MongoDB", "process B", "Bob's page"
    ann, a, db, b, bob = lanes
    picture = Sequence("One message, from key to screen", *lanes)
    picture.say(ann, a, "message, nonce").say(a, db, "insert number 18")
    picture.note(db, "stored")
    picture.say(db, a, "yes").say(a, ann, "receipt: 18", GOOD)
    picture.say(db, a, "change stream: 18").say(db, b, "change stream: 18", same=True)
    picture.say(a, ann, "message 18").say(b, bob, "message 18", same=True)
    return picture


def lost_receipt() -> Sequence:
    ann, server, bob = lanes = "Ann's page", "server", "Bob's page"
    picture = Sequence("A lost receipt", *lanes)
    picture.say(ann, server, "message, nonce n-1").note(server, "n-1 is number 18")
    picture.say(server, bob, "message 18").say(server, ann, "receipt: 18", lost=True)
    picture.note(ann, "no receipt: again", BAD).say(ann, server, "message, nonce n-1")
    picture.note(server, "n-1? number 18").say(server, ann, "receipt: 18", GOOD)
    return picture


def reconnect() -> Sequence:
    ann, server, bob = lanes = "Ann's page", "server", "Bob's page"
    picture = Sequence("Coming back with a number", *lanes)
    picture.say(ann, server, "message").say(server, bob, "message 17")
    picture.note(bob, "in a tunnel", BAD)
    picture.say(ann, server, "message").say(server, bob, "message 18", lost=True)
    picture.say(bob, server, "/ws?after=17").say(server, bob, "message 18", GOOD)
    picture.note(bob, "no gap")
    return picture


def two_processes() -> Sequence:
    ann, a, db, b, bob = lanes = (
        "Ann's page",
        "process A",
        "MongoDB",
        "process B",
        "Bob's page",
    )
    picture = Sequence("Two processes on one stream", *lanes)
    picture.say(a, db, "watch").say(b, db, "watch", same=True)
    picture.say(ann, a, "Hi Bob!").say(a, db, "insert 18")
    picture.say(db, a, "18").say(db, b, "18", same=True)
    picture.say(a, ann, "Hi Bob!").say(b, bob, "Hi Bob!", same=True)
    picture.say(bob, b, "Hi Ann!").say(b, db, "insert 19")
    picture.say(db, a, "19").say(db, b, "19", same=True)
    picture.say(a, ann, "Hi Ann!").say(b, bob, "Hi Ann!", same=True)
    return picture


class Drawing:
    def __init__(self, picture: str) -> None:
        self.picture = picture

    def _repr_html_(self) -> str:
        return self.picture


def small(x, y, words, anchor="middle") -> str:
    return text(x, y, words, anchor, "font-size='13'")


def parts() -> Drawing:
    """Draw the parts of the chat, and who talks to whom."""
    shapes = [
        box(10, 42 + 74 * row, 130, 50, f"{name} page\nchat.js")
        for row, name in enumerate(("Ann's", "Bob's", "your"))
    ]
    for row, name in enumerate("AB"):
        shapes.append(box(330, 60 + 92 * row, 150, 62, f"chat.py\nprocess {name}"))
    shapes.append(box(670, 100, 140, 74, "MongoDB\nor memory"))
    for page, process in ((67, 84), (141, 98), (215, 183)):
        shapes.append(arrow(142, page, 328, process))
        shapes.append(arrow(328, process, 142, page))
    for process, database in ((84, 122), (176, 140)):
        shapes.append(arrow(482, process, 668, database))
        back = (668, database + 12, 482, process + 14)
        shapes.append(arrow(*back, GOOD, dashed=True))
    shapes.append(small(236, 26, "WebSocket: events, both ways"))
    shapes.append(small(575, 74, "insert"))
    shapes.append(small(600, 232, "change stream: what was stored"))
    return Drawing(
        svg(830, 256, "The parts of the chat, and who talks to whom", shapes)
    )


def frame_bytes() -> Drawing:
    """Draw one text frame of a server, byte by byte, with its labels."""
    payload = '{"type": "joined", "user": "ann"}'
    shapes = [
        box(10, 10, 52, 40, "0x81"),
        box(68, 10, 52, 40, f"0x{len(payload):02x}"),
        box(126, 10, 330, 40, payload),
    ]
    labels = [
        (36, 126, "a text frame, complete"),
        (
            94,
            102,
            "33 bytes follow: 0x21. 0x7e, 126, says: the length is in the next two",
        ),
        (180, 78, "the payload in UTF-8: the same bytes for every reader"),
    ]
    for x, y, words in labels:
        line = f"<path d='M{x} 52 V{y - 4} h8' fill='none' stroke='currentColor' "
        shapes.append(
            f"{line} stroke-opacity='.5'/>" + small(x + 12, y, words, "start")
        )
    return Drawing(svg(560, 136, "A WebSocket frame", shapes))


# On GitHub a picture does not know the page's colours, so it brings its own card.
CARD = (
    "<style>svg { color: #1b2426 } .card { fill: #fff }"
    "@media (prefers-color-scheme: dark) { svg { color: #e6ecec }"
    " .card { fill: #1b2326 } }</style>"
    "<rect class='card' width='100%' height='100%' rx='10'/>"
)


def main() -> None:
    """Write the picture of one message to a file."""
    Path(sys.argv[1]).write_text(one_message().draw(CARD) + "\n", "utf-8")


if __name__ == "__main__":
    main()
