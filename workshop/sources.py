"""Show the source of chat.py as it is, and what an edit changes."""

import ast
import difflib
import functools
import inspect
import re
from html import escape
from pathlib import Path

from IPython.display import HTML, Markdown, display

import chat

SOURCE = Path(chat.__file__)
SCRIPTS = sorted(SOURCE.with_name("static").glob("*.js"))
LOADED = SOURCE.stat().st_mtime
LANGUAGES = {".py": "python", ".js": "javascript", ".html": "html"}


def show(*things) -> None:
    """Show the source of functions, classes or files."""
    for title, source, language in map(read, things):
        display(Markdown(f"*{title}*\n````{language}\n{source}\n````"))


def fold(summary: str, *things) -> None:
    """Show the same, folded under one line: open it when you want to read it."""
    parts = [f"<details><summary>{escape(summary)}</summary>\n"]
    for title, source, language in map(read, things):
        parts.append(f"*{title}*\n````{language}\n{source}\n````\n")
    display(Markdown("\n".join([*parts, "</details>"])))


def read(thing) -> tuple[str, str, str]:
    """Return a title, the source, and its language."""
    if isinstance(thing, Path):
        language = LANGUAGES.get(thing.suffix, "bash")
        return thing.name, thing.read_text("utf-8").rstrip(), language
    lines = where(thing)
    source = SOURCE.read_text("utf-8").splitlines()[lines[0] - 1 : lines[-1]]
    return title(lines).strip("*"), "\n".join(source), "python"


def stale() -> str:
    """Say so if chat.py is not what was imported."""
    changed = SOURCE.stat().st_mtime != LOADED
    return " — it has changed since it was imported: restart the kernel" * changed


def show_script(*names: str) -> None:
    """Show functions of the page's script."""
    source = "\n".join(path.read_text("utf-8") for path in SCRIPTS)
    pattern = r"^(?:export )?(?:async )?function {}\(.*?^}}\n"
    found = [re.search(pattern.format(name), source, re.M | re.S)[0] for name in names]
    text = "\n".join(found).rstrip()
    display(Markdown(f"*static/*\n````javascript\n{text}\n````"))


class head:
    """Stand for the beginning of a class, up to its first method."""

    def __init__(self, whole: type) -> None:
        self.whole = whole


def section(number: int, seen=None) -> None:
    """Show one definition of a section of chat.py, and fold everything else in it.

    Of a class show the beginning, up to its first method.
    """
    cut = where(head(seen) if inspect.isclass(seen) else seen) if seen else range(0)
    if seen:
        display(Markdown(f"{title(cut)}\n{code(cut)}"))
    folds = [
        piece for piece in pieces(number) if any(line not in cut for line in piece)
    ]
    count = sum(line not in cut for piece in folds for line in piece)
    parts = [f"*{'The rest of s' if seen else 'S'}ection {number}, {count} lines:*\n"]
    for piece in folds:
        length = sum(line not in cut for line in piece)
        summary = f"{', '.join(names_in(piece))} ({length} lines)"
        parts.append(f"<details><summary><code>{escape(summary)}</code></summary>\n")
        parts.append(f"{title(piece)}\n{code(piece, cut)}\n\n</details>")
    display(Markdown("\n".join(parts)))


def where(thing) -> range:
    """Return the lines of chat.py that define a function, a class, or its head."""
    lines, first = inspect.getsourcelines(getattr(thing, "whole", thing))
    if isinstance(thing, head):
        [tree] = ast.parse("".join(lines)).body
        method = next(m for m in tree.body if isinstance(m, FUNCTION))
        starts = [method.lineno, *(d.lineno for d in method.decorator_list)]
        lines = "".join(lines[: min(starts) - 1]).rstrip().splitlines()
    return range(first, first + len(lines))


FUNCTION = ast.FunctionDef, ast.AsyncFunctionDef


def pieces(number: int) -> list[range]:
    """Divide the lines of a section: a class is a piece, what is between two is one.

    Section 0 is what stands before the first one.
    """
    source = SOURCE.read_text("utf-8")
    banners = re.finditer(r"^# -{70,}\n# \d\. ", source, re.MULTILINE)
    starts = [source.count("\n", 0, banner.start()) + 1 for banner in banners]
    lines = source.splitlines()
    first, end = [1, *starts, len(lines) + 1][number : number + 2]
    found, start = [], first
    for node in parsed(source).body:
        if isinstance(node, ast.ClassDef) and first <= node.lineno < end:
            begin = min([node.lineno, *(d.lineno for d in node.decorator_list)])
            if names_in(range(start, begin)):
                found.append(range(start, begin))
                start = begin
            found.append(range(start, node.end_lineno + 1))
            start = node.end_lineno + 1
    found.append(range(start, end))
    return [part for piece in found if (part := stripped(piece, lines))]


def stripped(piece: range, lines: list[str]) -> range:
    """Leave out empty lines around a piece."""
    while piece and not lines[piece[0] - 1].strip():
        piece = piece[1:]
    while piece and not lines[piece[-1] - 1].strip():
        piece = piece[:-1]
    return piece


parsed = functools.lru_cache(ast.parse)


def names_in(piece: range) -> list[str]:
    """Return what is defined in some lines of chat.py."""
    found = []
    for node in parsed(SOURCE.read_text("utf-8")).body:
        if node.lineno in piece:
            if isinstance(node, (*FUNCTION, ast.ClassDef)):
                found.append(node.name)
            elif isinstance(node, ast.Assign):
                found.append(node.targets[0].id)
    return ["docstring, imports", *found] if piece[0] == 1 else found


def title(piece: range) -> str:
    return f"*chat.py, lines {piece[0]} to {piece[-1]}{stale()}*"


def code(piece: range, cut: range = range(0)) -> str:
    """Return lines of chat.py as Markdown; what is shown elsewhere is only named."""
    source = SOURCE.read_text("utf-8").splitlines()
    lines = [source[line - 1] for line in piece if line not in cut]
    if cut and cut[0] in piece:
        indent = " " * (len(source[cut[0] - 1]) - len(source[cut[0] - 1].lstrip()))
        note = f"{indent}# … lines {cut[0]} to {cut[-1]} are shown above"
        lines.insert(cut[0] - piece[0], note)
    return "\n".join(["````python", *lines, "````"])


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
