"""Show a learner's lines beside the functions of chat.py that keep the same rule."""

import inspect
import textwrap
from html import escape
from pathlib import Path

from IPython.display import HTML, display

import chat

SOURCE = Path(chat.__file__)
LOADED = SOURCE.stat().st_mtime
CODE = "margin:0;font-size:.85em;line-height:1.35;white-space:pre;overflow-x:auto"
# Of each rule: the words that mark your lines, and the functions of chat.py.
RULES = [
    (
        "1. A process inserts number n + 1 only after it has seen n.",
        ("messages.append", "= len(messages)"),
        [chat.post, chat.save],
    ),
    (
        "2. A message is broadcast only after it is stored.",
        ("messages.append", "broadcast(messages", "create_task(broadcast"),
        [chat.follow, chat.apply],
    ),
    (
        "3. No receipt? The same nonce again, which is stored once.",
        ("nonce", "numbers", "key"),
        [chat.save],
    ),
    (
        "4. A reader says the last number it has, and gets what it missed.",
        ("after", "send_json(message)", "connections.add", "connections[ws]"),
        [chat.WebSocket.replay, chat.WebSocket.join],
    ),
]


def rules(talk) -> None:
    """Show for each rule a handler's lines, and the functions of chat.py, in folds."""
    parts = [
        f"<details open><summary><b>{title}</b></summary>"
        f"{columns_of(talk, words, functions)}</details>"
        for title, words, functions in RULES
    ]
    display(HTML("".join(parts)))


def beside(attempt, *functions) -> None:
    """Show an attempt beside functions of chat.py."""
    display(HTML(columns_of(attempt, (), functions)))


def columns_of(attempt, words, functions) -> str:
    """Return two columns: an attempt's lines, those without a word faint; and ours."""
    lines = lines_of(attempt)
    known = [line for line in lines if any(word in line for word in words)]
    faint = "<span style='opacity:.45'>{}</span>"
    marked = [one if one in known or not known else faint.format(one) for one in lines]
    title, column = (
        "<p><em>{}</em></p>",
        "<div style='flex:1 1 28em;min-width:0'>{}</div>",
    )
    ours = [title.format(place(one)) + code(lines_of(one)) for one in functions]
    both = column.format(title.format("yours") + code(marked)) + column.format(
        "".join(ours)
    )
    return f"<div style='display:flex;flex-wrap:wrap;gap:1.5em'>{both}</div>"


def code(lines: list[str]) -> str:
    return f'<pre style="{CODE}">{chr(10).join(lines)}</pre>'


def lines_of(function) -> list[str]:
    """Return the source of a function; of a `talk`, with the `broadcast` it calls."""
    text = textwrap.dedent(inspect.getsource(function)).rstrip()
    if function.__name__ == "talk":
        text = inspect.getsource(function.__globals__["broadcast"]) + "\n\n" + text
    return escape(text).split("\n")


def place(function) -> str:
    """Say where a function stands, and whether the file has changed since."""
    lines, first = inspect.getsourcelines(function)
    said = (
        f"chat.py, lines {first} to {first + len(lines) - 1}: {function.__qualname__}"
    )
    if SOURCE.stat().st_mtime != LOADED:
        said += " (the file has changed since it was imported: restart the kernel)"
    return f'<a href="chat.py" target="_blank">{said}</a>'


def where(*things) -> None:
    """Say where some functions or classes stand in chat.py."""
    display(HTML("<br>".join(map(place, things))))
