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
    stale = SOURCE.stat().st_mtime != LOADED
    note = " — it has changed since it was imported: restart the kernel" * stale
    if isinstance(thing, Path):
        language = LANGUAGES.get(thing.suffix, "bash")
        return thing.name, thing.read_text("utf-8").rstrip(), language
    if isinstance(thing, str):  # names of constants, one string
        return f"chat.py{note}", constants(*thing.split()), "python"
    whole = getattr(thing, "whole", thing)
    lines, first = inspect.getsourcelines(whole)
    lines = lines[: getattr(thing, "length", len(lines))]
    title = f"chat.py, lines {first} to {first + len(lines) - 1}"
    if "." in whole.__qualname__:
        title += f", in class {whole.__qualname__.partition('.')[0]}"
    return title + note, "".join(lines).rstrip(), "python"


def constants(*names: str) -> str:
    """Return the assignments to some names of chat.py."""
    source = SOURCE.read_text("utf-8")
    lines, found = source.splitlines(), []
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign) and node.targets[0].id in names:
            found += lines[node.lineno - 1 : node.end_lineno]
    return "\n".join(found)


def show_constants(*names: str) -> None:
    show(" ".join(names))


def show_script(*names: str) -> None:
    """Show functions of the page's script."""
    source = "\n".join(path.read_text("utf-8") for path in SCRIPTS)
    pattern = r"^(?:export )?(?:async )?function {}\(.*?^}}\n"
    found = [re.search(pattern.format(name), source, re.M | re.S)[0] for name in names]
    text = "\n".join(found).rstrip()
    display(Markdown(f"*static/*\n````javascript\n{text}\n````"))


class head:
    """Stand for the beginning of a class, up to the first method after `__init__`."""

    def __init__(self, whole: type) -> None:
        lines, first = inspect.getsourcelines(whole)
        methods = [
            method.__code__.co_firstlineno - first
            for name, method in vars(whole).items()
            if inspect.isfunction(method) and name != "__init__"
        ]
        self.whole, self.length = whole, min(methods)
        while lines[self.length - 1].strip()[:1] in ("", "#", "@"):
            self.length -= 1


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
