"""The checks of all exercises: `await check.echo(talk)`."""

# ruff: noqa: F401
from workshop.cells import our
from workshop.check_chat import (
    bot,
    chat_tried,
    host,
    login,
    origin,
    policy,
    roomy,
    save,
    two_writers,
    undo,
)
from workshop.check_little import (
    bounded,
    broadcast,
    echo,
    history,
    me,
    names,
    no_ghosts,
    nothing_between,
    once,
    receipt,
    tried,
    typing,
    waiting_for_nobody,
)
