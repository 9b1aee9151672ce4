"""Measure the chat: its fan-out beside that of other servers, and what else it does.

    pip install -r requirements.txt -r bench/requirements.txt
    npm install --prefix bench            # Node's ws and Bun; left out if missing
    python bench/fanout.py                # about 12 minutes
    python bench/fanout.py --quick        # about two minutes

The whole run writes its tables into docs/performance.md and draws docs/fanout.png.
"""

import argparse
import contextlib
import itertools
import os
import platform
import re
import signal
import statistics
import sys
import time
from collections import defaultdict
from datetime import date
from pathlib import Path

if sys.platform != "linux":
    sys.exit("The benchmark needs Linux.")

import checks
import load
import servers

DOCS = Path(__file__).parent.parent / "docs"
MAIN = 1_000  # readers; every server is measured with so many
SHIPPED, ONE, EIGHT = "as shipped", "one waiting", "8 × 8"
WORKLOADS = {ONE: {"s": 1, "w": 1}, EIGHT: {"s": 8, "w": 8}}


# --- Fan-out ---
def measure(options, names, readers, workloads, people, limits, rounds) -> None:
    """Start servers and measure them in turns. Add summaries to `options.found`."""
    runs = defaultdict(list)
    with contextlib.ExitStack() as stack:
        room = {}
        for name in names:
            say(f"starting {name}")
            try:
                server = servers.start(name, options.chats, people, limits)
                room[name] = stack.enter_context(server)
                load.run(server, n=10, i=0.05, d=0.2)  # what only first messages cost
            except (servers.Missing, load.LoadError, OSError) as error:
                room.pop(name, None)
                options.missing[name] = str(error)
        # Other servers' turns are the chat's time to announce who has left.
        turns = itertools.product(range(rounds), workloads.items(), room.items())
        for turn, (workload, arguments), (name, server) in turns:
            key = readers, workload, name
            say(f"{name}, {readers:,} readers, {workload}, round {turn + 1}")
            try:
                runs[key].append(load.run(server, n=readers, **arguments))
            except load.LoadError as error:
                options.missing[f"{name}, {readers:,} readers"] = str(error)
    for key, found in runs.items():
        if all(runs.get((readers, workload, key[2])) for workload in workloads):
            options.found[key] = summarize(found)


def summarize(runs: list[dict]) -> dict:
    """Take the least CPU time per delivery: a busy machine adds to it. Else medians.

    A server that sends together what has waited needs less time when it is held up.
    So the share of a core is the median too, and holds on a quiet machine only.
    """
    return {
        "each": min((run["each"] for run in runs if run["each"]), default=None),
        "share": statistics.median(run["cpu"] / run["seconds"] for run in runs),
        "p50": statistics.median(run["p50"] for run in runs),
        "p99": statistics.median(run["p99"] for run in runs),
        "kib": runs[0]["kib"],  # a later run uses this one's memory again
        "missing": sum(run["missing"] for run in runs),
        "load": max(run["load"] for run in runs),
    }


def measure_all(options) -> None:
    names = [name for name in options.names if name not in checks.CHECKS]
    chosen = {*options.chats, servers.DEMO, servers.BUN}
    few = [name for name in names if name in chosen]
    people, readers = (20, 100) if options.quick else (200, MAIN)
    talk = {SHIPPED: {"s": people, "i": 1, "a": 1, "d": 2 if options.quick else 5}}
    measure(options, names, readers, talk, people, {}, options.rounds)
    seconds = {"d": 0.2 if options.quick else 1.5}
    workloads = {name: one | seconds for name, one in WORKLOADS.items()}
    for readers in [100] if options.quick else [100, MAIN, 4 * MAIN]:
        measured = names if readers == MAIN or options.quick else few
        rounds = options.rounds if readers <= MAIN else min(options.rounds, 2)
        measure(options, measured, readers, workloads, 8, servers.RAISED, rounds)


def run_checks(options) -> dict:
    """Run the checks on each chat in turn; return figures by what was measured."""
    facts, names = defaultdict(dict), [n for n in options.names if n in checks.CHECKS]
    for name, (label, path) in itertools.product(names, options.chats.items()):
        say(f"{name}, {label}")
        try:
            for what, figure in checks.CHECKS[name](path, options.quick):
                facts[what][label] = figure
        except Exception as error:  # the other checks go on
            reason = str(error) or type(error).__name__
            options.missing[f"{name}, {label}"] = reason
    return facts


def say(what: str) -> None:
    print(f"{time.strftime('%X')} {what}", file=sys.stderr, flush=True)


# --- Telling ---
def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    text = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return re.sub(r"^\| (chat.*?) \|", r"| **\1** |", text, flags=re.MULTILINE)


def figure(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:,.0f}" if value >= 100 else f"{value:#.3g}".rstrip(".")


def waits(one: dict) -> str:
    star = "\\*" if one["missing"] else ""
    return f"{figure(one['p50'])}; {figure(one['p99'])}{star}"


def shipped_table(options) -> str:
    """Make the table of what is reachable as shipped: the least CPU time first."""
    found = {key[2]: one for key, one in options.found.items() if key[1] == SHIPPED}
    head = ["server", "share of a core", "p50; p99, ms", "KiB per connection"]
    rows = [
        [name, f"{one['share']:.0%}", waits(one), figure(one["kib"])]
        for name, one in sorted(found.items(), key=lambda item: item[1]["share"])
    ]
    busiest = max((one["load"] for one in found.values()), default=0)
    return table(head, rows) + f"\n\nThe load used {busiest:.0%} of its own core."


def raised_table(options) -> str:
    """Make the table with raised limits: what costs least under load comes first."""
    found, rows = options.found, []
    head = ["server", "readers"]
    for workload in WORKLOADS:
        head += [f"{workload}: µs of CPU per delivery", "p50; p99, ms"]
    under_load = [(key, one) for key, one in found.items() if key[1] == EIGHT]
    under_load.sort(key=lambda item: (item[0][0], item[1]["each"] or 1e9))
    for (readers, _, name), busy in under_load:
        quiet = found[readers, ONE, name]
        cells = [figure(quiet["each"]), waits(quiet), figure(busy["each"]), waits(busy)]
        rows.append([name, f"{readers:,}", *cells])
    return table(head, rows)


def ratios(options) -> list[str]:
    """Compare the CPU time of each server to the chat's."""
    lines = []
    for (readers, workload, name), one in sorted(options.found.items()):
        mine = options.found.get((readers, workload, "chat"))
        if mine and name != "chat" and mine["each"] and one["each"]:
            ratio = one["each"] / mine["each"]
            lines.append(f"{readers:,} readers, {workload}: {name} / chat: {ratio:.2f}")
    return lines


def machine() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    models = [line.partition(":")[2] for line in lines if line.startswith("model name")]
    cpu = models[0].strip() if models else platform.machine()
    python = f"{platform.python_implementation()} {platform.python_version()}"
    system = f"{platform.system()} {platform.release().partition('-')[0]}"
    return f"{date.today()}, {os.cpu_count()} cores of {cpu}, {system}, {python}"


def tell(options, facts: dict, text_file: Path | None) -> None:
    """Print the tables, and write each between its marks in the text file."""
    labels = list(options.chats)
    rows = [[w, *(by.get(label, "–") for label in labels)] for w, by in facts.items()]
    tables = {"machine": machine()}
    tables |= {"shipped": shipped_table(options), "raised": raised_table(options)}
    tables |= {"checks": table(["", *labels], rows)}
    text = text_file.read_text() if text_file else ""
    for name, content in tables.items():
        print(f"\n{content}")
        mark = f"<!-- {name} -->"
        block = f"{mark}\n\n{content}\n\n{mark}"
        text = re.sub(f"{mark}.*?{mark}", lambda _, b=block: b, text, flags=re.DOTALL)
    print("", *ratios(options), sep="\n")
    for what, reason in options.missing.items():
        print(f"Left out: {what}: {reason}")
    if text_file:
        text_file.write_text(text)


def plot(options, path: Path) -> None:
    """Draw what is reachable as shipped beside what is not."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    found = options.found
    names = [name for n, what, name in found if (n, what) == (MAIN, SHIPPED)]
    names = [name for name in names if (MAIN, EIGHT, name) in found]
    names.sort(key=lambda name: -found[MAIN, SHIPPED, name]["share"])
    figure, (left, right) = plt.subplots(1, 2, sharey=True, figsize=(11, 4.2))
    ones = [found[MAIN, SHIPPED, name] for name in names]
    bars = left.barh(names, [one["share"] * 100 for one in ones], 0.6, color="#2f6fab")
    left.bar_label(bars, [f" {one['p99']:,.0f} ms" for one in ones], fontsize=8)
    left.set_xlim(0, 130)
    left.set_xlabel("% of a core (beside each bar: p99 of delivery)")
    title = "As shipped: 200 people, each a message a second"
    left.set_title(title, loc="left", fontsize=10)
    for workload, colour, shift in (ONE, "#b9c4d0", 0.2), (EIGHT, "#2f6fab", -0.2):
        rates = [1e6 / (found[MAIN, workload, n]["each"] or 1e9) for n in names]
        places = [place + shift for place in range(len(names))]
        bars = right.barh(places, rates, 0.38, color=colour, label=workload)
        right.bar_label(bars, [f" {short(rate)}" for rate in rates], fontsize=8)
    right.set_xscale("log")
    right.set_xlim(1e4, 1e8)
    right.set_xlabel("deliveries per second of the server's CPU (logarithmic)")
    right.set_title("Limits raised", loc="left", fontsize=10)
    right.legend(loc="lower right", fontsize=8, frameon=False)
    for axes in left, right:
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"One message to {MAIN:,} readers", x=0.01, ha="left")
    figure.text(0.99, 0.01, machine(), ha="right", fontsize=6, color="#777777")
    figure.tight_layout(rect=(0, 0.02, 1, 1))
    figure.savefig(path, dpi=130)


def short(rate: float) -> str:
    return f"{rate / 1e6:.1f} M" if rate >= 1e6 else f"{rate / 1e3:.3g} k"


# --- The command ---
def read_options():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--quick", action="store_true", help="about two minutes; rough figures")
    parts = [*servers.PEERS, *checks.CHECKS]
    add("--only", metavar="NAMES", help=f"parts of names: chat, {', '.join(parts)}")
    more = "another chat.py beside this one; may be repeated"
    add("--chat", metavar="NAME=PATH", action="append", default=[], help=more)
    add("--rounds", type=int, help="3; with 4,000 readers at most 2")
    options = parser.parse_args()
    options.chats = {"chat": servers.CHAT}
    for name, _, path in (chat.partition("=") for chat in options.chat):
        options.chats[name] = Path(path).resolve()
    names = [*options.chats, f"chat{servers.ON_ASYNCIO}", *parts]
    wanted = [part.strip().lower() for part in (options.only or "").split(",")]
    for part in wanted:
        if not any(part in name.lower() for name in names):
            parser.error(f"nothing is called {part!r}")
    options.names = [name for name in names if any(w in name.lower() for w in wanted)]
    options.rounds = options.rounds or (1 if options.quick else 3)
    options.whole = not (options.quick or options.only)
    options.found, options.missing = {}, {}
    return options


def main() -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # stop the servers as well
    options = read_options()
    load.raise_descriptor_limit()
    load.compiled()
    os.sched_setaffinity(0, load.CORES[-1:])
    start = time.monotonic()
    measure_all(options)
    facts = run_checks(options)
    tell(options, facts, DOCS / "performance.md" if options.whole else None)
    if options.whole:
        plot(options, DOCS / "fanout.png")
    say(f"all done in {(time.monotonic() - start) / 60:.1f} minutes")


if __name__ == "__main__":
    main()
