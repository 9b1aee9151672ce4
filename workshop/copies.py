"""Break a copy, never the original."""

import atexit
import importlib.util
import inspect
import itertools
import linecache
import shutil
import sys
import tempfile
from pathlib import Path
from types import FunctionType

import chat
from workshop.sources import difference

COPIES = tempfile.TemporaryDirectory(prefix="chat-")
atexit.register(COPIES.cleanup)
FILES = "chat.py", "templates", "static"
GAP = "…"  # what a learner has to replace
KEPT = 20  # modules of the newest copies; each is some megabytes
numbers, modules = itertools.count(1), []


class Page(str):
    """The text of a page that `edit` can change."""


class NotAttempted:
    """Stand for a copy whose `…` is still there, or one that Python can't run."""

    def __init__(self, wrong: str = "") -> None:
        self.wrong = wrong

    def __repr__(self) -> str:
        return self.wrong or "○ Not attempted yet: there is a … to replace."


NOT_ATTEMPTED = NotAttempted()
NOTHING_NEW = NotAttempted(
    "○ Nothing new to check. If your cell raised an error, read its last line."
)


def edit(old: str, new: str, file: str = "chat.py", of=chat, **names):
    """Return a copy with one piece of it replaced, and show the difference.

    `of` is the chat, a handler, a page, or a copy that `edit` returned. `names` are
    what a handler needs beside its own. A line that is still `…` is not attempted yet.
    Raises ValueError if the piece is not there exactly once.
    """
    if isinstance(of, NotAttempted):
        return of
    if GAP in map(str.strip, new.splitlines()):
        return NOT_ATTEMPTED
    if isinstance(of, Page):
        return Page(replace("the page", of, old, new))
    try:
        if isinstance(of, FunctionType):
            source = replace("your handler", inspect.getsource(of), old, new)
            return define(source, of, names)
        return copy(old, new, file, of)
    except SyntaxError as error:
        line = error.text or linecache.getline(error.filename or "", error.lineno or 0)
        line = line.strip()
        return NotAttempted(f"✗ Python can't read this copy: {error.msg}, in `{line}`")
    except NameError as error:
        return NotAttempted(f"✗ Python can't run this copy: {error}")


def copy(old: str, new: str, file: str, of):
    """Return a module whose files are those of another one, with one piece replaced."""
    folder = Path(tempfile.mkdtemp(dir=COPIES.name))
    for name in FILES:
        take = shutil.copytree if (of.HERE / name).is_dir() else shutil.copy
        take(of.HERE / name, folder / name)
    before = (folder / file).read_text("utf-8")
    (folder / file).write_text(replace(file, before, old, new), "utf-8")
    spec = importlib.util.spec_from_file_location(folder.name, folder / "chat.py")
    sys.modules[folder.name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    modules.append(folder.name)
    while len(modules) > KEPT:
        del sys.modules[modules.pop(0)]
    return module


def replace(title: str, text: str, old: str, new: str) -> str:
    if text.count(old) != 1:
        raise ValueError(f"{title} has {old!r} {text.count(old)} times, not once")
    after = text.replace(old, new)
    difference(f"A copy of {title}", text, after)
    return after


def define(source: str, like: FunctionType, names: dict) -> FunctionType:
    """Run the source of a function beside the names that another one uses."""
    file = f"<copy {next(numbers)} of {like.__name__}>"
    linecache.cache[file] = len(source), None, source.splitlines(True), file
    notebook = vars(sys.modules["__main__"])  # with what a learner has defined there
    names = notebook | like.__globals__ | names | {"__name__": "__main__"}
    exec(compile(source, file, "exec"), names)
    return names[like.__name__]
