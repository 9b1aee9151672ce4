"""Measure the chat: its fan-out beside that of other servers, and what else it does.

    pip install -r requirements.txt -r bench/requirements.txt
    npm install --prefix bench            # Node's ws and Bun; left out if missing
    python bench/fanout.py                # about half an hour
    python bench/fanout.py --quick        # about a minute

Servers are measured in turns, on the first core; the load comes from a program in C
on the last one. Nothing leaves the machine, and all of it ends by
itself. The figure to trust is the server's CPU time per delivery (one frame to one
reader): it says about the same on a busy machine as on a quiet one.
"""

import argparse
import contextlib
import functools
import itertools
import json
import math
import os
import platform
import statistics
import sys
import time
from datetime import date
from pathlib import Path

if sys.platform != "linux":
    sys.exit("The benchmark needs Linux.")

import checks
import load
import servers

WORKLOADS = {"one": {"s": 1, "w": 1}, "eight": {"s": 8, "w": 8}}
ROOT = Path(__file__).parent.parent
DEMO = "aiohttp demo chat"
PYTHON = [name for name in servers.PEERS if name not in ("Node ws", "Bun publish")]
PYTHON.remove(f"{DEMO} on uvloop")  # a variant of ours: its README has none
MAIN = 1_000  # readers; in rooms of other sizes, some peers stand for all
ONLY_MAIN = servers.PEERS.keys() - {DEMO, f"{DEMO} on uvloop", "Bun publish"}


# --- Fan-out ---
def measure_room(names, readers: int, rounds: int, options, missing: dict) -> dict:
    """Start all servers, then measure them in turns. Return the summaries by name."""
    runs = {}
    with contextlib.ExitStack() as stack:
        room = {}
        for name in names:
            try:
                server = servers.start(name, options.chats, options.accounts)
                room[name] = stack.enter_context(server)
            except servers.Missing as error:
                missing[name] = str(error)
        # The chat tells who has left: the others' turns are its time for that.
        turns = itertools.product(range(rounds), WORKLOADS.items(), room.items())
        for turn, (workload, senders), (name, server) in turns:
            key = f"{name}, {readers:,} readers"
            if key in missing:
                continue
            say(f"{key}, {workload}, round {turn + 1}")
            try:
                load.run(server, n=10, d=0.1)  # what comes only with the first messages
                run = load.run(server, n=readers, d=options.seconds, **senders)
                runs.setdefault(name, {}).setdefault(workload, []).append(run)
            except load.LoadError as error:
                missing[key] = str(error)
    return {name: summarize(found) for name, found in runs.items()}


def summarize(found: dict[str, list[dict]]) -> dict:
    """Take the least CPU time: a busy machine only adds. Of the rest, the median."""
    summary = {"kib": found["one"][0]["kib"]}  # later, memory is used again
    for workload in WORKLOADS:
        runs = [run for run in found.get(workload, []) if run["each"]]
        summary[workload] = {
            "each": min((run["each"] for run in runs), default=None),
            "p50": statistics.median([run["p50"] for run in runs] or [math.nan]),
            "p99": statistics.median([run["p99"] for run in runs] or [math.nan]),
            "missing": sum(run["missing"] for run in found.get(workload, [])),
        }
    return summary


def say(what: str) -> None:
    print(f"{time.strftime('%X')} {what}", file=sys.stderr, flush=True)


# --- Telling ---
HEAD = """\
| readers | server | one sender, waiting: µs of CPU a delivery | p50, p99 ms \
| 8 senders × 8 in flight: µs of CPU a delivery | p50, p99 ms | KiB a connection |
|---:|---|---:|---:|---:|---:|---:|"""


def table(summaries: dict, chats) -> str:
    """Make the table: what costs least under load comes first."""

    def cost(key):
        return key[0], summaries[key]["eight"]["each"] or float("inf")

    lines, lost = [HEAD], False
    for readers, name in sorted(summaries, key=cost):
        summary = summaries[readers, name]
        bold = "**" if name.removesuffix(servers.WITHOUT) in chats else ""
        cells = [f"{readers:,}", f"{bold}{name}{bold}"]
        for workload in WORKLOADS:
            one = summary[workload]
            star, lost = ("\\*", True) if one["missing"] else ("", lost)
            cells.append(f"{figure(one['each'])}{star}")
            cells.append(f"{figure(one['p50'])}, {figure(one['p99'])}")
        cells.append(f"{summary['kib']:.1f}" if readers >= MAIN else "–")
        lines.append(f"| {' | '.join(cells)} |")
    if lost:
        lines.append("\n\\* Not all had arrived when the measurement ended.")
    return "\n".join(lines)


def figure(value: float | None) -> str:
    if value is None or value != value:
        return "–"
    return f"{value:,.0f}" if value >= 100 else f"{value:#.3g}".rstrip(".")


def compare(summaries: dict, chats) -> list[tuple]:
    """Return the targets of the fan-out: what, ratio of costs, the most it may be."""
    found = []

    def target(readers, workload, other, most, chat="chat"):
        mine, theirs = summaries.get((readers, chat)), summaries.get((readers, other))
        if mine and theirs and mine[workload]["each"] and theirs[workload]["each"]:
            what = "one sender, waiting" if workload == "one" else "8 × 8 in flight"
            what = f"{readers:,} readers, {what}: {chat} to {other}"
            ratio = mine[workload]["each"] / theirs[workload]["each"]
            found.append((what, ratio, most))

    def best(readers, workload):
        costs = {name: summaries.get((readers, name)) for name in PYTHON}
        costs = {name: one[workload]["each"] for name, one in costs.items() if one}
        costs = {name: cost for name, cost in costs.items() if cost}
        return min(costs, key=costs.get, default="")

    target(100, "one", f"{DEMO} on uvloop", 1.15)
    target(100, "one", DEMO, 1.15, f"chat{servers.WITHOUT}")
    target(MAIN, "one", best(MAIN, "one"), 1)
    for readers in sorted({readers for readers, _ in summaries}):
        for first in [label for label in chats if label != "chat"]:
            target(readers, "one", first, 1)
            target(readers, "eight", first, 1)
        target(readers, "eight", "Bun publish", 1)
    target(MAIN, "eight", DEMO, 0.1)
    target(MAIN, "eight", "FastAPI ConnectionManager", 0.2)
    target(MAIN, "eight", best(MAIN, "eight"), 0.333)
    chat = summaries.get((MAIN, f"chat{servers.WITHOUT}"))
    demo = summaries.get((MAIN, DEMO))
    if chat and demo:
        what = "memory of an idle connection, without uvloop: chat to aiohttp demo chat"
        found.append((what, chat["kib"] / demo["kib"], 1.27))
    return found


def target_table(rows: list[tuple]) -> str:
    lines = ["| target | measured | at most | |", "|---|---:|---:|---|"]
    for what, value, most in rows:
        met = "met" if value <= most else "no"
        lines.append(f"| {what} | {value:.2f} | {most:g} | {met} |")
    return "\n".join(lines)


def fact_table(facts: dict, labels: list[str]) -> str:
    """Make a table with a column for each chat."""
    lines = [f"| | {' | '.join(labels)} |", f"|---|{'---|' * len(labels)}"]
    for (_, what), values in facts.items():
        cells = [values.get(label, "–") for label in labels]
        lines.append(f"| {what} | {' | '.join(cells)} |")
    return "\n".join(lines)


def machine() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    models = [line.partition(":")[2] for line in lines if line.startswith("model name")]
    cpu = models[0].strip() if models else platform.machine()
    python = f"{platform.python_implementation()} {platform.python_version()}"
    system = f"{platform.system()} {platform.release().partition('-')[0]}"
    return f"{date.today()}, {os.cpu_count()} cores of {cpu}, {system}, {python}"


def plot(summaries: dict, readers: int, chats, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = {name: one for (count, name), one in summaries.items() if count == readers}
    rows = {name: one for name, one in rows.items() if one["eight"]["each"]}
    names = sorted(rows, key=lambda name: -rows[name]["eight"]["each"])
    figure, axes = plt.subplots(figsize=(9, 0.42 * len(names) + 1.4))
    for shift, (workload, label, colour) in enumerate(
        [
            ("one", "one sender, waiting for its message", "#b9c4d0"),
            ("eight", "eight senders, eight messages in flight each", "#2f6fab"),
        ]
    ):
        rates = [1e6 / (rows[name][workload]["each"] or 1e9) for name in names]
        places = [place + 0.38 * shift for place in range(len(names))]
        bars = axes.barh(places, rates, 0.38, color=colour, label=label)
        texts = [f" {short(rate)}" for rate in rates]
        axes.bar_label(bars, texts, fontsize=8)
    axes.set_xscale("log")
    axes.set_xlim(right=axes.get_xlim()[1] * 2)
    axes.set_yticks([place + 0.19 for place in range(len(names))], names)
    for label in axes.get_yticklabels():
        if label.get_text().removesuffix(servers.WITHOUT) in chats:
            label.set_fontweight("bold")
    axes.set_xlabel("deliveries per second of the server's CPU (logarithmic)")
    axes.set_title(f"One message to {readers:,} readers", loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="lower right", fontsize=8, frameon=False)
    figure.text(0.99, 0.01, machine(), ha="right", fontsize=6, color="#777777")
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def short(rate: float) -> str:
    return f"{rate / 1e6:.1f} M" if rate >= 1e6 else f"{rate / 1e3:.3g} k"


# --- The command ---
def read_options():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="about a minute")
    parser.add_argument(
        "--only",
        metavar="NAMES",
        help="some servers and checks, with commas between (or parts of their names): "
        f"chat, {', '.join([*servers.PEERS, *checks.CHECKS])}",
    )
    parser.add_argument(
        "--chat",
        metavar="NAME=PATH",
        action="append",
        default=[],
        help="another chat.py beside this one; may be repeated",
    )
    parser.add_argument("--readers", metavar="COUNTS", help="such as 100,1000,4000")
    parser.add_argument("--accounts", type=int, default=8, help="of those connected")
    parser.add_argument("--rounds", type=int, help="up to 1,000 readers; above 1")
    parser.add_argument("--seconds", type=float, help="of each measurement")
    parser.add_argument("--plot", type=Path, help="default: docs/fanout.png, if full")
    parser.add_argument("--json", type=Path, help="where to write all figures")
    options = parser.parse_args()
    others = [chat.partition("=") for chat in options.chat]
    options.chats = {"chat": servers.CHAT}
    options.chats |= {name: Path(path).resolve() for name, _, path in others}
    ours = [name + end for end in ("", servers.WITHOUT) for name in options.chats]
    names = [*ours, *servers.PEERS, *checks.CHECKS]
    options.names = choose(parser, names, options.only)
    readers = options.readers or ("100" if options.quick else "100,1000,4000")
    options.readers = [int(count) for count in readers.replace("_", "").split(",")]
    options.rounds = options.rounds or (1 if options.quick else 5)
    options.seconds = options.seconds or (0.2 if options.quick else 2)
    if not (options.plot or options.quick or options.only):
        options.plot = ROOT / "docs" / "fanout.png"
    return options


def choose(parser, names: list[str], wanted: str | None) -> list[str]:
    chosen = []
    for part in (wanted or "").lower().split(","):
        part = part.strip()
        exact = [name for name in names if name.lower() == part]
        found = exact or [name for name in names if part in name.lower()]
        if not found:
            parser.error(f"nothing is called {part!r}; there are {', '.join(names)}")
        chosen += found
    return [name for name in names if name in chosen]


def main() -> None:
    options = read_options()
    load.raise_file_limit()
    load.compiled()
    os.sched_setaffinity(0, load.CORES[-1:])
    print(machine(), flush=True)
    start = time.perf_counter()
    fanout = [name for name in options.names if name not in checks.CHECKS]
    chosen = [name for name in options.names if name in checks.CHECKS]
    everywhere = [name for name in fanout if name not in ONLY_MAIN]
    summaries, missing = {}, {}
    for readers in options.readers:
        rounds = options.rounds if readers <= MAIN else 1
        room = fanout if readers == MAIN or MAIN not in options.readers else everywhere
        found = measure_room(room, readers, rounds, options, missing)
        summaries |= {(readers, name): summary for name, summary in found.items()}
    facts, rows = run_checks(chosen, options, missing)
    rows = compare(summaries, options.chats) + rows
    parts = [table(summaries, options.chats)] if summaries else []
    parts += [fact_table(facts, list(options.chats))] if facts else []
    parts += [target_table(rows)] if rows else []
    if missing:
        lines = [f"- {name}: {reason}" for name, reason in missing.items()]
        parts.append("\n".join(["Left out, in whole or in part:", *lines]))
    print("\n" + "\n\n".join(parts))
    print(f"\nMeasured in {time.perf_counter() - start:.0f} s.")
    most = MAIN if MAIN in options.readers else max(options.readers)
    if options.plot and summaries:
        plot(summaries, most, options.chats, options.plot)
        print(f"Drawn: {options.plot}")
    if options.json:
        figures = [
            {"readers": readers, "server": name} | summary
            for (readers, name), summary in summaries.items()
        ]
        everything = {
            "machine": machine(),
            "fanout": figures,
            "chat": list(facts.items()),
        }
        everything |= {"targets": rows, "missing": missing}
        options.json.write_text(json.dumps(everything, indent=1))


def run_checks(names, options, missing) -> tuple[dict, list]:
    """Run the checks on each chat in turn; return facts and targets.

    A fact that begins with … belongs to the one before, and is found by both names.
    """
    facts, rows = {}, []
    with contextlib.ExitStack() as stack:

        @functools.cache
        def mongodb() -> str:
            if options.quick:
                raise servers.Missing("MongoDB, because of --quick")
            return stack.enter_context(servers.mongodb())

        options.mongodb = mongodb
        databases = itertools.count(1)
        options.new_name = lambda: f"bench_{next(databases)}"
        for check, (label, path) in itertools.product(names, options.chats.items()):
            say(f"{check}, {label}")
            try:
                last = ""
                for what, *values in checks.CHECKS[check](path, options):
                    if len(values) == 2:
                        rows.append((f"{label}: {what}", *values))
                        continue
                    last = what if not what.startswith("…") else last
                    facts.setdefault((last, what), {})[label] = values[0]
            except (servers.Missing, load.LoadError, OSError) as error:
                reason = str(error) or type(error).__name__
                missing[f"{check}, {label}"] = reason
    return facts, rows


if __name__ == "__main__":
    main()
