"""Say on one screen whether this machine is ready for the workshop.

    python -m workshop                 opens your browser for a moment
    python -m workshop --no-browser    leaves the browser out

The last line is for your instructor. The check looks for each package before it imports
it. It also runs on a Python that is too old, so that it can say so.
"""

import asyncio
import importlib.metadata
import os
import platform
import re
import subprocess
import sys
import time
import webbrowser
from pathlib import Path
from threading import Thread

from workshop.mongodb import find_mongod, free_port, is_free

REQUIREMENTS = Path(__file__).parent / "requirements.txt"
MARKS = {"yes": "\33[32m✓\33[0m", "no": "\33[31m✗\33[0m", "maybe": "\33[33m○\33[0m"}
PYTHON = f'"{sys.executable}"' if " " in sys.executable else sys.executable
INSTALL = f"{PYTHON} -m pip install -r workshop/requirements.txt"
BROWSER_SECONDS = 15


class Report:
    """Print a line for each thing that was looked at, and keep the short forms."""

    def __init__(self) -> None:
        self.ready, self.short = True, []

    def say(self, state: str, what: str, found: str, short: str = "") -> bool:
        mark = MARKS[state]
        if not sys.stdout.isatty() or "NO_COLOR" in os.environ:
            mark = re.sub("\33.*?m", "", mark)
        print(f" {mark} {what:<12} {found}")
        self.ready &= state != "no"
        self.short.append(short or f"{what} {state}")
        return state == "yes"


def look_at_python(report: Report) -> None:
    version, fits = platform.python_version(), sys.version_info >= (3, 11)
    found = version if fits else f"{version}; the workshop needs 3.11 or newer"
    report.say("yes" if fits else "no", "Python", found, f"Python {version}")
    system = f"{platform.system()} {platform.machine()}"
    report.say("yes", "System", system, system)


def read_requirements(path: Path) -> list[str]:
    """Return the lines of a requirements file and of those that it begins with."""
    found = []
    for line in path.read_text("utf-8").splitlines():
        requirement = line.partition("#")[0].strip()
        if requirement.startswith("-r "):
            found += read_requirements(path.parent / requirement[3:])
        elif requirement:
            found.append(requirement)
    return found


def look_at_packages(report: Report) -> bool:
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
        return report.say("no", "Packages", found, f"missing {' '.join(missing)}")
    found = f"all {len(seen)} of workshop/requirements.txt; aiohttp {seen['aiohttp']}"
    return report.say("yes", "Packages", found, f"aiohttp {seen['aiohttp']}")


def as_numbers(version: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", version)][:3]


def look_at_port(report: Report) -> None:
    if is_free("127.0.0.1", 8080):
        report.say("yes", "Port", "8080 is free", "port 8080 free")
        return
    other = f"8080 is taken; the notebook takes another one, like {free_port()}"
    report.say("maybe", "Port", other, "port 8080 taken")


async def look_at_chat(report: Report) -> None:
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
        report.say("no", "WebSocket", cause, f"WebSocket {type(error).__name__}")
        return
    found = f"the chat runs; a receipt came after {took:.1f} ms"
    report.say("yes", "WebSocket", found, f"receipt {took:.0f} ms")


OUTER = """<!doctype html><title>Workshop: a look at your browser</title>
<h1>A look at your browser</h1><p>You can close this window when it says “done”.</p>
<iframe src="http://localhost:{port}/frame" width="600" height="120"></iframe>"""

FRAME = """<!doctype html><p id="said">Looking …</p><script>
const socket = new WebSocket(`ws://${location.host}/ws`);
socket.onmessage = (frame) => {
  document.getElementById("said").textContent = "done: " + frame.data;
  fetch("/report?" + frame.data);
};
</script>"""


async def look_at_browser(report: Report) -> None:
    """Open a page whose frame opens a WebSocket, with a cookie, like the notebook."""
    from aiohttp import web

    loop, ports = asyncio.get_running_loop(), []
    answer = loop.create_future()

    async def outer(request):
        page = OUTER.format(port=ports[1])
        return web.Response(text=page, content_type="text/html")

    async def frame(request):
        response = web.Response(text=FRAME, content_type="text/html")
        response.set_cookie("workshop", "kept", samesite="Lax", httponly=True)
        return response

    async def ws(request):
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        await socket.send_str(f"cookie={request.cookies.get('workshop', 'lost')}")
        async for _ in socket:
            pass
        return socket

    async def hear(request):
        agent = re.findall(r"\w+/\d+", request.headers.get("User-Agent", ""))
        if not answer.done():
            answer.set_result((request.query.get("cookie"), agent))
        return web.Response()

    def open_browser(url):  # in a thread of its own: some wait until they are closed
        if not webbrowser.open(url):
            loop.call_soon_threadsafe(answer.cancel)

    app = web.Application()
    routes = ("/", outer), ("/frame", frame), ("/ws", ws), ("/report", hear)
    app.add_routes([web.get(path, handler) for path, handler in routes])
    runner = web.AppRunner(app, shutdown_timeout=0.1, access_log=None)
    await runner.setup()
    for _ in range(2):  # page and frame have two origins, as in the notebook
        await web.TCPSite(runner, "127.0.0.1", 0).start()
    ports += [port for _, port in runner.addresses]
    url = f"http://localhost:{ports[0]}/"
    Thread(target=open_browser, args=(url,), daemon=True).start()
    try:
        cookie, agent = await asyncio.wait_for(answer, BROWSER_SECONDS)
    except (TimeoutError, asyncio.CancelledError) as error:
        silent = isinstance(error, TimeoutError)
        cause = "did not answer" if silent else "none was found on this machine"
        short = "browser silent" if silent else "no browser"
        report.say("maybe", "Browser", f"{cause}; any modern one will do", short)
        return
    finally:
        await runner.cleanup()
    name = next((part for part in agent if not part.startswith(SAME)), "?")
    found = f"{name}: a frame with a WebSocket works"
    kept = {"kept": "and keeps cookies"}.get(cookie, "but loses its cookie")
    report.say("yes", "Browser", f"{found} {kept}", f"{name} {cookie}")


SAME = "Mozilla/", "AppleWebKit/", "Gecko/", "KHTML/"  # every browser says these


def look_at_mongodb(report: Report) -> None:
    if os.environ.get("MONGO_HOST"):
        report.say("yes", "MongoDB", "MONGO_HOST is set", "MongoDB by MONGO_HOST")
    elif path := find_mongod():
        report.say("yes", "MongoDB", path)
    else:
        found = "none; “Several processes” and the last exercise need one"
        report.say("maybe", "MongoDB", found, "MongoDB no")


async def main() -> int:
    report = Report()
    print("\n Is this machine ready for the workshop?\n")
    look_at_python(report)
    if look_at_packages(report):
        await look_at_chat(report)
        if "--no-browser" not in sys.argv:
            await look_at_browser(report)
    look_at_port(report)
    look_at_mongodb(report)
    verdict = "READY" if report.ready else "NOT READY"
    print("\n Send this line to your instructor:\n")
    print(f" {verdict} · {' · '.join(report.short)}\n")
    return 0 if report.ready else 1


if __name__ == "__main__":
    if os.name == "nt":
        subprocess.run("", shell=True)  # lets the old console of Windows show colours
    sys.stdout.reconfigure(errors="replace")
    sys.exit(asyncio.run(main()))
