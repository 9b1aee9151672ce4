"""Tools, checks, pictures and a tiny page for tutorial.ipynb.

    from workshop import check, edit, play, serve, show

Each name is loaded when you first ask for it, so that the tests can import
`workshop.mongodb` without waiting for IPython.
"""

import importlib

HOMES = {
    "sources": "difference screen section show",
    "copies": "edit",
    "people": "Person quiet",
    "wire": "Wire",
    "servers": "Process Server look serve serving stop two_processes",
    "tiny": "little page play stall stop_playing",
    "room": "close_room open_room",
    "mongodb": "NO_MONGODB find_mongod replica_set",
}
MODULES = {"check": "checks", "pictures": "pictures", "scenarios": "scenarios"}


def __getattr__(name: str):
    if name in MODULES:
        return importlib.import_module(f"workshop.{MODULES[name]}")
    for home, names in HOMES.items():
        if name in names.split():
            return getattr(importlib.import_module(f"workshop.{home}"), name)
    raise AttributeError(f"workshop has no {name!r}")
