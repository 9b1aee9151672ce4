"""The code of a learner's cells: found, compared, and run again.

A check runs the cell that defines an attempt once more, with names of its own. So it
judges what stands in that cell, whatever other cells have defined since. And each
server of part A begins with empty collections.
"""

import ast
import inspect
import linecache
from pathlib import Path
from types import FunctionType

STEPS = Path(__file__).with_name("steps")
KEPT = ast.Import, ast.ImportFrom, ast.Assign, ast.AnnAssign, ast.FunctionDef
KEPT += ast.AsyncFunctionDef, ast.ClassDef, ast.If, ast.Try


def function_of(attempt) -> FunctionType | None:
    """Return a function, or the first one of a class; None if it has none."""
    if inspect.isclass(attempt):
        parts = [getattr(one, "__func__", one) for one in vars(attempt).values()]
        return next((one for one in parts if isinstance(one, FunctionType)), None)
    function = inspect.unwrap(attempt)
    return function if isinstance(function, FunctionType) else None


def file_of(attempt) -> str:
    """Return the name of the cell, or of the file, that defines an attempt."""
    function = function_of(attempt)
    return function.__code__.co_filename if function else ""


def tree_of(file: str) -> ast.Module:
    """Parse what a cell defines. Leave out what it shows, calls or awaits."""
    tree = ast.parse("".join(linecache.getlines(file)))
    tree.body = [
        node for node in tree.body if isinstance(node, KEPT) and not waits(node)
    ]
    return tree


def waits(node: ast.stmt) -> bool:
    value = getattr(node, "value", None)
    return value is not None and any(isinstance(n, ast.Await) for n in ast.walk(value))


def is_as_given(file: str, name: str) -> bool:
    """Return whether a cell is still the one that the exercise began with."""
    given = STEPS / "given" / f"{name}.txt"
    trees = tree_of(file), ast.parse(given.read_text("utf-8"))
    return ast.dump(trees[0]) == ast.dump(trees[1])


def is_ours(attempt) -> bool:
    return file_of(attempt).startswith(str(STEPS))


def our_file(name: str) -> str:
    return str(STEPS / f"{name}.py")


def define(names: dict, *files: str) -> dict:
    """Run what some cells define, one after the other, in a copy of some names."""
    names = dict(names)
    for file in files:
        exec(compile(tree_of(file), file, "exec"), names)
    return names


def ours(name: str, *wanted: str):
    """Return our own solution of an exercise, from `workshop/steps/`."""
    found = define({"__name__": f"workshop.steps.{name}"}, our_file(name))
    return found[wanted[0]] if len(wanted) == 1 else tuple(found[n] for n in wanted)
