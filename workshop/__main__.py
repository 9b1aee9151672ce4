"""Say on one screen whether this machine is ready for the workshop.

    python -m workshop

The last line is for your instructor. The check looks for each package before it imports
it. It also runs on a Python that is too old, so that it can say so.
"""

import asyncio
import importlib.metadata
import os
import platform
import re
import shutil
import sys
import time
import webbrowser
from pathlib import Path

from workshop.mongodb import find_mongod, is_free

REQUIREMENTS = Path(__file__).parent / "requirements.txt"
PYTHON = f'"{sys.executable}"' if " " in sys.executable else sys.executable
INSTALL = f"{PYTHON} -m pip install -r workshop/requirements.txt"
BROWSERS = "chromium chromium-browser google-chrome firefox firefox-esr microsoft-edge"
short, missing_parts = [], []  # of the last line; what the workshop can't do without


def say(mark: str, what: str, found: str, brief: str) -> None:
    """Print a line for a thing that was looked at, and keep its short form."""
    print(f" {mark} {what:<12} {found}")
    short.append(brief)
    if mark == "✗":
        missing_parts.append(what)


def look_at_python() -> None:
    version, fits = platform.python_version(), sys.version_info >= (3, 11)
    found = f"{version}, {platform.system()} {platform.machine()}"
    found += "" if fits else "; the workshop needs 3.11 or newer"
    say("✓" if fits else "✗", "Python", found, f"Python {found}")


def read_requirements(path: Path) -> list:
    """Return the lines of a requirements file and of those that it begins with."""
    found = []
    for line in path.read_text("utf-8").splitlines():
        requirement = line.partition("#")[0].strip()
        if requirement.startswith("-r "):
            found += read_requirements(path.parent / requirement[3:])
        elif requirement:
            found.append(requirement)
    return found


def look_at_packages() -> None:
    missing, seen = [], {}
    for requirement in read_requirements(REQUIREMENTS):
        name, least = re.fullmatch(r"([\w.-]+)(?:>=([\d.]+))?.*", requirement).groups()
        try:
            seen[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            missing.append(name)
            continue
        if as_numbers(seen[name]) < as_numbers(least or ""):
            missing.append(f"{name} {seen[name]} (needs {least})")
    if missing:
        found = f"missing: {', '.join(missing)}\n{'':16}{INSTALL}"
        say("✗", "Packages", found, f"missing {' '.join(missing)}")
    else:
        found = f"all {len(seen)} that workshop/requirements.txt names"
        say("✓", "Packages", found, f"aiohttp {seen['aiohttp']}")


def as_numbers(version: str) -> list:
    return [int(number) for number in re.findall(r"\d+", version)][:3]


async def look_at_chat() -> None:
    """Start the real chat, sign up, and wait for a receipt over a WebSocket."""
    try:
        from workshop.servers import serving

        async with serving() as server:
            ann = await server.join("ann")
            start = time.perf_counter()
            await ann.say("Hello?")
            took = (time.perf_counter() - start) * 1000
    except Exception as error:  # whatever it is, the attendee can pass it on
        cause = f"{type(error).__name__}: {error}"
        say("✗", "WebSocket", cause, f"WebSocket {type(error).__name__}")
    else:
        found = f"the chat runs; a receipt came after {took:.1f} ms"
        say("✓", "WebSocket", found, f"receipt {took:.0f} ms")


def look_at_port() -> None:
    free = is_free("127.0.0.1", 8080)
    found = "8080 is free" if free else "8080 is taken; the notebook takes another one"
    say("✓" if free else "○", "Port", found, f"port 8080 {'free' if free else 'taken'}")


def look_at_browser() -> None:
    """Look for a program. `webbrowser` alone finds none without a screen of its own."""
    found = next(filter(None, map(shutil.which, BROWSERS.split())), None)
    try:
        found = found or webbrowser.get().name
    except webbrowser.Error:
        say("○", "Browser", "none was found; any modern one will do", "no browser")
    else:
        say("✓", "Browser", found, f"browser {Path(found).name}")


def look_at_mongodb() -> None:
    if os.environ.get("MONGO_HOST"):
        say("✓", "MongoDB", "MONGO_HOST is set", "MongoDB by MONGO_HOST")
    elif path := find_mongod():
        say("✓", "MongoDB", path, "MongoDB yes")
    else:
        say("○", "MongoDB", "none; only “kill -9” needs one", "MongoDB no")


def main() -> int:
    print("\n Is this machine ready for the workshop?\n")
    look_at_python()
    look_at_packages()
    if not missing_parts:
        asyncio.run(look_at_chat())
    look_at_port()
    look_at_browser()
    look_at_mongodb()
    verdict = "NOT READY" if missing_parts else "READY"
    print("\n Send this line to your instructor:\n")
    print(f" {verdict} · {' · '.join(short)}\n")
    return 1 if missing_parts else 0


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")
    sys.exit(main())
