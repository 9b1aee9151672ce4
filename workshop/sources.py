"""Show the source of chat.py as it is, and what an edit changes."""

import ast
import difflib
import inspect
import re
from html import escape
from pathlib import Path

from IPython.display import HTML, Markdown, display

import chat

SOURCE = Path(chat.__file__)
LOADED = SOURCE.stat().st_mtime
TEXT = inspect.getsource(chat)  # as it was imported, whatever becomes of the file
LINES, TREE = TEXT.splitlines(), ast.parse(TEXT).body
FUNCTION = ast.FunctionDef, ast.AsyncFunctionDef


# --- Sections of chat.py ---
def section(number: int, seen=None) -> None:
    """Show one definition of a section of chat.py, and fold everything else in it.

    Of a class show the fields.
    """
    cut = where(seen) if seen else range(0)
    if seen:
        display(Markdown(f"{title(cut)}\n{code(cut)}"))
    rest = {piece: sum(n not in cut for n in piece) for piece in pieces(number)}
    start = "The rest of section" if seen else "Section"
    parts = [f"*{start} {number}, {sum(rest.values())} lines:*\n"]
    for piece, count in rest.items():
        if count:
            summary = f"{', '.join(names_in(piece))} ({count} lines)"
            parts.append(f"<details><summary><code>{summary}</code></summary>\n")
            parts.append(f"{title(piece)}\n{code(piece, cut)}\n\n</details>")
    display(Markdown("\n".join(parts)))


def where(thing) -> range:
    """Return the lines that define a function; of a class, the lines of its fields."""
    nodes = TREE
    for name in thing.__qualname__.split("."):
        node = next(one for one in nodes if getattr(one, "name", "") == name)
        nodes = getattr(node, "body", [])
    if not isinstance(node, ast.ClassDef):
        return range(first_line(node), node.end_lineno + 1)
    fields = [one for one in nodes if isinstance(one, ast.AnnAssign)]
    return range(fields[0].lineno, fields[-1].end_lineno + 1)


def first_line(node) -> int:
    return min([node.lineno, *(one.lineno for one in node.decorator_list)])


def pieces(number: int) -> list[range]:
    """Divide the lines of a section: a class is a piece, what is between two is one.

    Section 0 is what stands before the first one.
    """
    banners = re.finditer(r"^# -{70,}\n# \d\. ", TEXT, re.MULTILINE)
    starts = [TEXT.count("\n", 0, banner.start()) + 1 for banner in banners]
    start, end = [1, *starts, len(LINES) + 1][number : number + 2]
    found = []
    for node in TREE:
        if isinstance(node, ast.ClassDef) and start <= node.lineno < end:
            if names_in(range(start, first_line(node))):
                found.append(range(start, first_line(node)))
                start = first_line(node)
            found.append(range(start, node.end_lineno + 1))
            start = node.end_lineno + 1
    found.append(range(start, end))
    return [piece for piece in map(stripped, found) if piece]


def stripped(piece: range) -> range:
    """Leave out empty lines around a piece."""
    filled = [number for number in piece if LINES[number - 1].strip()]
    return range(filled[0], filled[-1] + 1) if filled else range(0)


def names_in(piece: range) -> list[str]:
    """Return what is defined in some lines."""
    found = ["docstring, imports"] if piece and piece[0] == 1 else []
    for node in TREE:
        if node.lineno in piece:
            if isinstance(node, (*FUNCTION, ast.ClassDef)):
                found.append(node.name)
            elif isinstance(node, ast.Assign):
                found.append(node.targets[0].id)
    return found


def title(piece: range) -> str:
    """Say where some lines stand; and if the file is not what was imported."""
    place = f"chat.py, lines {piece[0]} to {piece[-1]}"
    for node in TREE:
        if isinstance(node, ast.ClassDef) and node.lineno < piece[0] <= node.end_lineno:
            place += f", in class {node.name}"
    if SOURCE.stat().st_mtime != LOADED:
        place += " (it has changed since it was imported: restart the kernel)"
    return f"*{place}*"


def code(piece: range, cut: range = range(0)) -> str:
    """Return lines as Markdown; of what is shown elsewhere, only say where it is."""
    lines = [LINES[number - 1] for number in piece if number not in cut]
    if cut and cut[0] in piece:
        first = LINES[cut[0] - 1]
        indent = first[: len(first) - len(first.lstrip())]
        note = f"{indent}# … lines {cut[0]} to {cut[-1]} are shown above"
        lines.insert(cut[0] - piece[0], note)
    return "\n".join(["````python", *lines, "````"])


# --- Files, differences, pages ---
def show(path: Path, folded: bool = False) -> None:
    """Show a file, or fold it under its name."""
    text = f"````bash\n{path.read_text('utf-8').rstrip()}\n````"
    if folded:
        text = f"<details><summary>{path.name}</summary>\n\n{text}\n\n</details>"
    display(Markdown(text if folded else f"*{path.name}*\n{text}"))


def difference(title: str, before: str, after: str) -> None:
    """Show what differs between two texts, with two lines around it."""
    texts = before.splitlines(), after.splitlines()
    colours = {"-": "#ff525233", "+": "#00c85333", "@": "#8882"}
    lines = [
        f'<span style="background:{colours.get(line[0], "none")}">{escape(line)}</span>'
        for line in list(difflib.unified_diff(*texts, n=2, lineterm=""))[2:]
    ]
    display(HTML(f"<p><em>{title}</em></p><pre>{chr(10).join(lines)}</pre>"))


def screen(html: str, height: int = 300) -> None:
    """Show a page that the server has sent, as it looks. Nothing in it can run."""
    style = SOURCE.with_name("static").joinpath("chat.css").read_text("utf-8")
    html = re.sub("<link rel=.icon.*?>|<(no)?script.*?script>| autofocus", "", html)
    style = f"<style>{style}</style>"
    html = re.sub("<link rel=.stylesheet.*?>", lambda _: style, html)
    frame = f'<iframe sandbox srcdoc="{escape(html)}" title="A page" width="100%" '
    frame += f'height="{height}" style="border:1px solid #8888"></iframe>'
    display(HTML(f"<div>{frame}</div>"))
