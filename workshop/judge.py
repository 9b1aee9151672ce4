"""How a check is run: what it says of an attempt, and what the notebook goes on with."""

import asyncio
import contextlib
import functools
import gc
import re
import threading
import time
import warnings
from unittest.mock import patch

from workshop.cells import define, file_of, function_of, is_as_given, is_ours
from workshop.cells import our_file, ours
from workshop.people import patience

NOT_ATTEMPTED = "○ Not attempted yet: the cell is as it was. Below, our solution runs."
NOTHING_NEW = "○ Nothing new to check. If your cell raised an error, read its end."
YOURS = "  Below, your attempt runs as it is."
judged = {}  # the exercise for which a cell was judged first, by the cell


class Lacking(Exception):
    """Say what an attempt still lacks."""


class Unable(Exception):
    """Say what a check needs that this machine does not have."""


def need(condition, sentence: str) -> None:
    if not condition:
        raise Lacking(sentence)


def exercise(*wanted: str):
    """Make a check of an exercise, which defines what is `wanted`.

    The check gets the attempt, run again from its own cell: what another cell has
    defined since does not count. It returns what the notebook goes on with: the
    attempt; or our solution, if the cell is as it was. So a wrong attempt is never
    followed by what a right one would show.
    """

    def decorate(check):
        name = check.__name__

        @functools.wraps(check)
        async def run(attempt):
            if not file_of(attempt):
                said = NOT_ATTEMPTED  # such as a class without a method
            elif is_ours(attempt):
                said = NOTHING_NEW
            elif is_as_given(file_of(attempt), name):
                said = NOT_ATTEMPTED
            else:
                again = from_its_cell(attempt, name, wanted[-1])
                said = await verdict(check, again)
                before = judged.setdefault(file_of(attempt), name)
                if said[0] == "✓":
                    print(said)
                    return again
                if before == name:
                    print(f"{said}\n{YOURS}")
                    return again
                said = NOTHING_NEW  # the cell was judged in another exercise
            print(said)
            return ours(name, wanted[-1])

        return run

    return decorate


def from_its_cell(attempt, name: str, wanted: str):
    """Run an attempt's cell again, after our solution: it has what the cell lacks."""
    files = our_file(name), file_of(attempt)
    again = define(function_of(attempt).__globals__, *files)[wanted]
    again.files = files
    return again


async def verdict(check, attempt, seconds: float = 30) -> str:
    """Run a check. Return what it says: nothing lacks where it begins with ✓."""
    said = "✓ Done."
    try:
        with no_sleep_of_a_thread() as slept:
            async with patience(seconds):
                await check(attempt)
    except Unable as error:
        return f"○ {error}"
    except (Lacking, ConnectionError) as error:
        said = f"✗ Not yet. {error}"
    except TimeoutError as error:
        said = f"✗ Not yet. {str(error) or f'It takes more than {seconds} s.'}"
    except asyncio.CancelledError:
        if asyncio.current_task().cancelling():  # the cell itself is cancelled
            raise
        said = "✗ Not yet. It raised CancelledError, as awaiting a cancelled task does."
    except Exception as error:  # an attempt may raise anything
        said = f"✗ Not yet. It raised {type(error).__name__}: {error}"
    if slept:
        blocks = "`time.sleep` blocks the event loop, and everyone waits."
        return f"✗ Not yet. {blocks} Await `asyncio.sleep`."
    return said


@contextlib.contextmanager
def no_sleep_of_a_thread():
    """Note where an attempt lets the event loop sleep, which would stop the check."""
    slept, sleep = [], time.sleep

    def instead(seconds: float) -> None:
        if threading.current_thread() is threading.main_thread():
            slept.append(seconds)
        else:
            sleep(seconds)

    with patch.object(time, "sleep", instead):
        yield slept


@contextlib.asynccontextmanager
async def naming_what_is_not_awaited():
    """Say of a block which coroutine was never awaited: it causes later failures."""
    gc.freeze()  # what was there before is not the attempt's
    failure, messages = None, []
    with warnings.catch_warnings(record=True, action="always") as caught:
        try:
            yield
        except Exception as error:
            failure = error
            while error:  # a traceback's frames hold what they have seen
                error.__traceback__, error = None, error.__context__
        for _ in range(2):  # a warning holds its coroutine, which may hold another one
            gc.collect()
            messages += [str(warning.message) for warning in caught]
            caught.clear()
    gc.unfreeze()
    for message in messages:
        need_awaited(message)
    if failure:
        raise failure


def need_awaited(message: str) -> None:
    found = re.search(r"coroutine '(?:\S+\.)?(\w+)' was never awaited", message)
    if found and found[1] != "wrapper":  # of mongomock-motor
        raise Lacking(f"`{found[1]}` was called and never awaited.")
