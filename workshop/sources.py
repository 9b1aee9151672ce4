"""Show a learner's lines beside the functions of chat.py that keep the same rule."""

import inspect
from html import escape
from pathlib import Path

from IPython.display import HTML, display

import chat

SOURCE = Path(chat.__file__)
LOADED = SOURCE.stat().st_mtime
CODE = "margin:0;font-size:.85em;line-height:1.35;white-space:pre;overflow-x:auto"
# Of each rule: the words that mark your lines, and the functions of chat.py.
RULES = {
    "1. A process inserts number n + 1 only after it has seen n.": (
        ("messages.append", "= len(messages)"),
        (chat.post, chat.Message.save),
    ),
    "2. A message is broadcast only after it is stored.": (
        ("messages.append", "broadcast(messages", "create_task(broadcast"),
        (chat.follow, chat.apply_message),
    ),
    "3. No receipt? The same nonce again, which is stored once.": (
        ("nonce", "numbers", "key"),
        (chat.Message.save,),
    ),
    "4. A reader says the last number it has, and gets what it missed.": (
        ("after", "send_json(message)", "connections.add", "connections[ws]"),
        (chat.WebSocket.replay, chat.WebSocket.join),
    ),
    "And write, don't wait, up to a bound (step 6).": (
        ("transport", "make_frame"),
        (chat.WebSocket.write,),
    ),
}


def rules(talk) -> None:
    """Show for each rule a handler's lines, and the functions of chat.py, in folds."""
    parts = []
    for title, (words, functions) in RULES.items():
        names = ", ".join(one.__qualname__ for one in functions)
        summary = f"<summary><b>{title}</b> In chat.py: <code>{names}</code></summary>"
        columns = columns_of(talk, words, functions)
        parts.append(f"<details open>{summary}{columns}</details>")
    display(HTML("".join(parts)))


def beside(attempt, *functions) -> None:
    """Show an attempt beside functions of chat.py."""
    display(HTML(columns_of(attempt, (), functions)))


def columns_of(talk, words, functions) -> str:
    lines = lines_of(talk)
    if words and not any(word in line for line in lines for word in words):
        lines = ["Nothing yet: your handler awaits each send."]
    marked = [
        f'<span style="opacity:{1 if seen(line, words) else 0.45}">{escape(line)}</span>'
        for line in lines
    ]
    theirs = "".join(
        f"<p style='margin:.4em 0'><em>{place(one)}</em></p>{code(own_lines(one))}"
        for one in functions
    )
    ours = f"<p style='margin:.4em 0'><em>yours</em></p>{code(marked)}"
    column = "<div style='flex:1 1 28em;min-width:0'>{}</div>"
    both = column.format(ours) + column.format(theirs)
    return f"<div style='display:flex;flex-wrap:wrap;gap:1.5em'>{both}</div>"


def seen(line: str, words: tuple) -> bool:
    return not words or any(word in line for word in words)


def code(lines: list[str]) -> str:
    return f'<pre style="{CODE}">{chr(10).join(lines)}</pre>'


def lines_of(talk) -> list[str]:
    """Return the lines of a handler, with those of the `broadcast` that it calls."""
    called = talk.__globals__.get("broadcast") if talk.__name__ == "talk" else None
    text = inspect.getsource(called) + "\n" if called else ""
    return (text + inspect.getsource(talk)).splitlines()


def own_lines(function) -> list[str]:
    """Return the source of a function, as it was imported, with its margin cut off."""
    return [
        escape(line)
        for line in inspect.cleandoc(inspect.getsource(function)).split("\n")
    ]


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
    display(HTML("<br>".join(place(one) for one in things)))
