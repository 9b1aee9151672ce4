"""How a check is run: what it says, and what the notebook goes on with."""

import asyncio
import contextlib
import functools
import gc
import re
import warnings

from workshop.cells import (
    define,
    file_of,
    function_of,
    is_as_given,
    is_ours,
    our_file,
    ours,
)
from workshop.people import patience

NOT_ATTEMPTED = "○ Not attempted yet: the cell is as it was. Below, our solution runs."
NOTHING_NEW = "○ Nothing new to check. If your cell raised an error, read its end."
YOURS = "  Below, your attempt runs as it is."


class Lacking(Exception):
    """Say what an attempt still lacks."""


def need(condition, sentence: str) -> None:
    if not condition:
        raise Lacking(sentence)


def expect(what: str, came, wanted) -> None:
    """Require a value; the sentence says what came, and what was expected."""
    need(came == wanted, f"{what} {came!r}, not {wanted!r}.")


def exercise(*wanted: str):
    """Make a check of an exercise: its cell defines the first name that is `wanted`.

    The check gets what has the last of these names, after the cell was run again: what
    another cell has defined since does not count. It returns what the notebook goes on
    with: that; or our solution, if the cell is as it was. So a wrong attempt is never
    followed by what a right one would show.
    """

    def decorate(check):
        name = check.__name__

        @functools.wraps(check)
        async def run(attempt):
            if getattr(attempt, "judged", name) != name or is_ours(attempt):
                print(NOTHING_NEW)  # what an earlier check has returned
                return attempt
            # A class without a method has no file.
            if not file_of(attempt) or is_as_given(file_of(attempt), name):
                print(NOT_ATTEMPTED)
                return ours(name, wanted[-1])
            # First our solution, for what the attempt's cell may lack.
            files = our_file(name), file_of(attempt)
            again = define(function_of(attempt).__globals__, *files)[wanted[-1]]
            again.files, again.judged = files, name
            said = await verdict(check, again)
            print(said if said[0] == "✓" else f"{said}\n{YOURS}")
            return again

        return run

    return decorate


async def verdict(check, attempt, seconds: float = 30) -> str:
    """Run a check. Return what it says: nothing lacks where it begins with ✓."""
    try:
        async with patience(seconds):
            await check(attempt)
    except (Lacking, ConnectionError) as error:
        return f"✗ Not yet. {error}"
    except TimeoutError as error:
        return f"✗ Not yet. {str(error) or f'It takes more than {seconds} s.'}"
    except asyncio.CancelledError:
        if asyncio.current_task().cancelling():  # the cell itself is cancelled
            raise
        return "✗ Not yet. It raised CancelledError, as awaiting a cancelled task does."
    except Exception as error:  # an attempt may raise anything
        return f"✗ Not yet. It raised {type(error).__name__}: {error}"
    return "✓ Done."


@contextlib.asynccontextmanager
async def trying(block, explain):
    """Serve an attempt. What it never awaited, or what its log says, is the cause."""
    failure, log = None, []
    try:
        with noting_what_is_not_awaited() as names:
            async with block as server:
                log = server.log
                yield server
    except Exception as error:
        failure = error
    need_awaited(names)
    for line in log:
        if cause := explain(line, failure):
            raise Lacking(cause)
    if failure:
        raise failure


def need_awaited(names: list[str]) -> None:
    for name in names:
        raise Lacking(f"`{name}` was called and never awaited.")


@contextlib.contextmanager
def noting_what_is_not_awaited():
    """Give a list that in the end names the coroutines that were never awaited."""
    gc.freeze()  # what was there before is not the attempt's
    failure, names = None, []
    with warnings.catch_warnings(record=True, action="always") as caught:
        try:
            yield names
        except Exception as error:
            failure = error
            while error:  # a traceback's frames hold what they have seen
                error.__traceback__, error = None, error.__context__
        for _ in range(2):  # a warning holds its coroutine, which may hold another one
            gc.collect()
            said = " ".join(str(warning.message) for warning in caught)
            names += re.findall(r"coroutine '(?:\S+\.)?(\w+)' was never awaited", said)
            caught.clear()
    gc.unfreeze()
    if "wrapper" in names:  # of mongomock-motor
        names.remove("wrapper")
    if failure:
        raise failure


async def scoreboard(scenarios: list, run) -> None:
    """Run every scenario, and print what holds."""
    for scenario in scenarios:
        said = await verdict(run, scenario)
        print(said[0], scenario.__doc__, said[2:] if said[0] != "✓" else "")
