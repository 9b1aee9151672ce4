"""Measure the chat: its fan-out beside that of other servers, and what else it does.

    pip install -r requirements.txt -r bench/requirements.txt
    npm install --prefix bench            # Node's ws and Bun; left out if missing
    python bench/fanout.py                # about a quarter of an hour
    python bench/fanout.py --quick        # less than a minute

Every server runs alone, one after another in turns, on the first core; the load comes
from this process, on the last. Nothing leaves the machine, and all of it is bounded.
The figure to trust is the server's CPU time per delivery (one frame to one reader): it
says about the same on a busy machine as on a quiet one.
"""

import argparse
import contextlib
import functools
import json
import os
import platform
import statistics
import sys
import time
from datetime import date
from pathlib import Path

try:
    import checks
    import load
    import servers
    from tqdm import tqdm
except ModuleNotFoundError as error:
    sys.exit(f"{error.name} is missing: pip install -r bench/requirements.txt")

NAN = float("nan")
WORKLOADS = {"one": (1, 1), "eight": (8, 8)}  # senders, messages in flight of each
ROOT = Path(__file__).parent.parent


# --- Fan-out ---
def measure(name: str, readers: int, seconds: float, chat: Path) -> dict:
    """Connect the readers to a fresh server, and run both workloads."""
    server, message, cookie, cookies = servers.start(name, chat)
    with server:
        room = load.Load(server.port, message)
        try:
            return measure_room(server, room, readers, seconds, cookie, cookies)
        finally:
            room.close()


def measure_room(server, room, readers, seconds, cookie, cookies) -> dict:
    warm = load.Load(server.port, room.message)  # what comes only with first messages
    warm.connect(10, cookie, talk=True)
    warm.settle()
    warm.run(0.2, talkers=1, in_flight=1)
    warm.settle()
    before, start = server.memory(), time.perf_counter()
    share, rest = divmod(readers, len(cookies))
    room.connect(share // 2 + rest, cookie)
    for number, own in enumerate(cookies):  # who talks may sit anywhere in the room
        room.connect(1, own, talk=True)
        last = number + 1 == len(cookies)
        room.connect(share - share // 2 if last else share, cookie)
    connecting = time.perf_counter() - start
    room.settle()
    memory = (server.memory() - before) / (readers + len(cookies))
    warm.close()
    room.settle()
    result = {"memory": memory, "connecting": connecting}
    for workload, (talkers, in_flight) in WORKLOADS.items():
        room.run(min(seconds / 4, 0.5), talkers, in_flight)
        calm = room.settle(limit=15)
        result[workload] = (
            room.run(seconds, talkers, in_flight, cpu=server.cpu) if calm else {}
        )
    return result


def measure_all(names, plan, options, progress) -> tuple[dict, dict]:
    """Measure all servers in turn, and again for every number of readers in the plan.

    Return the results by (readers, name), and why others are missing.
    """
    results, missing = {}, {}
    for readers in plan:
        for name in names:
            progress.set_description(f"{name}, {readers:,} readers")
            if name not in missing:
                try:
                    result = measure(name, readers, options.seconds, options.chat)
                    results.setdefault((readers, name), []).append(result)
                except servers.Missing as error:
                    missing[name] = str(error)
                except (load.LoadError, OSError) as error:
                    key = f"{name}, {readers:,} readers"
                    missing.setdefault(key, f"{type(error).__name__}: {error}")
            progress.update()
    return results, missing


def summarize(rounds: list[dict]) -> dict:
    """Return the median of some rounds, figure by figure."""
    summary = {
        key: statistics.median(one[key] for one in rounds)
        for key in ("memory", "connecting")
    }
    for workload in WORKLOADS:
        runs = [one[workload] for one in rounds if one[workload]]
        for run in runs:
            run["rate"] = run["deliveries"] / run["seconds"]
            nothing = not (run["deliveries"] and run["cpu"])
            run["per_cpu"] = NAN if nothing else run["deliveries"] / run["cpu"]
        figures = runs[0] if runs else dict.fromkeys(FIGURES, NAN)
        median = {
            key: statistics.median(run[key] for run in runs or [figures])
            for key in figures
        }
        median["missing"] = max((run["missing"] for run in runs), default=1)
        summary[workload] = median
    return summary


# --- Telling ---
FIGURES = ("rate", "per_cpu", "p50", "p99")
HEAD = """\
| readers | server | one sender, waiting: deliveries/s | CPU µs each | p50, p99 ms \
| 8 senders × 8 in flight: deliveries/s | CPU µs each | p50, p99 ms | KiB a connection |
|---:|---|---:|---:|---:|---:|---:|---:|---:|"""


def table(summaries: dict) -> str:
    """Make the table: what costs least under load comes first."""
    lines = [HEAD]
    for readers, name in sorted(summaries, key=lambda key: rank(key, summaries)):
        summary = summaries[readers, name]
        bold = "**" if name in servers.CHAT_NAMES else ""
        cells = [f"{readers:,}", f"{bold}{name}{bold}"]
        for workload in WORKLOADS:
            run = summary[workload]
            lost = " *" if run["missing"] else ""
            cells += [
                f"{run['rate']:,.0f}{lost}",
                f"{1e6 / run['per_cpu']:#.3g}".rstrip("."),
                f"{figure(run['p50'] * 1000)}, {figure(run['p99'] * 1000)}",
            ]
        cells.append(f"{summary['memory'] / 1024:.1f}")
        lines.append(f"| {' | '.join(cells)} |")
    if any("*" in line.replace("**", "") for line in lines[1:]):
        lines.append("\n\\* Not all had arrived when the measurement ended.")
    return "\n".join(lines)


def rank(key: tuple[int, str], summaries: dict) -> tuple[int, float]:
    per_cpu = summaries[key]["eight"]["per_cpu"]
    return key[0], -per_cpu if per_cpu == per_cpu else 0  # NaN comes last


def figure(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 or value != value else f"{value:.2g}"


def ratios(summaries: dict, readers: int) -> list[tuple[str, float, float, bool]]:
    """Return the targets at so many readers: what, ratio, target, whether it is met."""
    at = {name: one for (count, name), one in summaries.items() if count == readers}
    if "chat" not in at:
        return []
    found, chat = [], at["chat"]

    def least(what, other, target, workload="eight"):
        if other in at:
            ratio = chat[workload]["per_cpu"] / at[other][workload]["per_cpu"]
            found.append((what, ratio, target, ratio >= target))

    def best(workload):
        rivals = [name for name in at if name in PYTHON]
        return max(rivals, key=lambda name: at[name][workload]["per_cpu"], default="")

    load_of = "8 × 8 in flight, deliveries per CPU-second, to"
    least(f"{load_of} aiohttp's demo chat", "aiohttp demo chat", 10)
    least(f"{load_of} FastAPI's ConnectionManager", "FastAPI ConnectionManager", 5)
    least(f"{load_of} the best Python peer ({best('eight')})", best("eight"), 3)
    least(f"{load_of} Bun's publish (moonshot)", "Bun publish", 1)
    what = f"one sender waiting, the same, to the best Python peer ({best('one')})"
    least(what, best("one"), 1, "one")
    if "aiohttp demo chat" in at:
        ratio = chat["memory"] / at["aiohttp demo chat"]["memory"]
        what = "memory of an idle connection, to aiohttp's demo chat"
        found.append((what, ratio, 1.25, ratio <= 1.25))
    return found


PYTHON = [name for name in servers.PEERS if name not in ("Node ws", "Bun publish")]


def ratio_table(rows) -> str:
    lines = ["| target, as a ratio | measured | wanted | |", "|---|---:|---:|---|"]
    for what, ratio, target, met in rows:
        least = "at most" if "memory" in what or "p99" in what or "`/`" in what else ""
        wanted = f"{least or 'at least'} {target:g}"
        lines.append(f"| {what} | {ratio:.2f} | {wanted} | {'met' if met else 'no'} |")
    return "\n".join(lines)


def machine() -> str:
    cpu = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        models = [
            line.partition(":")[2].strip()
            for line in cpuinfo.read_text().splitlines()
            if line.startswith("model name")
        ]
        cpu = models[0] if models else cpu
    python = f"{platform.python_implementation()} {platform.python_version()}"
    system = f"{platform.system()} {platform.release().partition('-')[0]}"
    return f"{date.today()}, {os.cpu_count()} cores of {cpu}, {system}, {python}"


def plot(summaries: dict, readers: int, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = {name: one for (count, name), one in summaries.items() if count == readers}
    names = sorted(rows, key=lambda name: rows[name]["eight"]["per_cpu"])
    figure, axes = plt.subplots(figsize=(9, 0.42 * len(names) + 1.4))
    for shift, (workload, label, colour) in enumerate(
        [
            ("one", "one sender, waiting for its message", "#b9c4d0"),
            ("eight", "eight senders, eight messages in flight each", "#2f6fab"),
        ]
    ):
        rates = [rows[name][workload]["per_cpu"] for name in names]
        places = [place + 0.38 * shift for place in range(len(names))]
        bars = axes.barh(places, rates, 0.38, color=colour, label=label)
        texts = [f" {short(rate)}" for rate in rates]
        axes.bar_label(bars, texts, fontsize=8)
    axes.set_xscale("log")
    axes.set_xlim(right=axes.get_xlim()[1] * 2)
    axes.set_yticks([place + 0.19 for place in range(len(names))], names)
    for label in axes.get_yticklabels():
        if label.get_text() in servers.CHAT_NAMES:
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
    names = [*servers.CHAT_NAMES, *servers.PEERS, *checks.CHECKS]
    parser.add_argument("--quick", action="store_true", help="less than a minute")
    parser.add_argument(
        "--only",
        metavar="NAMES",
        help=f"some of these, with commas between (or parts of them): {names}",
    )
    parser.add_argument("--readers", metavar="COUNTS", help="such as 100,1000,4000")
    parser.add_argument("--rounds", type=int, help="at 1,000 readers; the others get 1")
    parser.add_argument("--seconds", type=float, help="of each measurement")
    parser.add_argument("--chat", type=Path, default=servers.CHAT, help="another one")
    parser.add_argument("--plot", type=Path, help="default: docs/fanout.png, if full")
    parser.add_argument("--json", type=Path, help="where to write all figures")
    options = parser.parse_args()
    options.names = choose(parser, names, options.only)
    options.readers = [
        int(count)
        for count in (options.readers or ("100" if options.quick else "100,1000,4000"))
        .replace("_", "")
        .split(",")
    ]
    options.rounds = options.rounds or (1 if options.quick else 3)
    options.seconds = options.seconds or (0.2 if options.quick else 2)
    if not (options.plot or options.quick or options.only):
        options.plot = ROOT / "docs" / "fanout.png"
    return options


def choose(parser, names: list[str], wanted: str | None) -> list[str]:
    if not wanted:
        return names
    chosen = []
    for part in wanted.split(","):
        part = part.strip().lower()
        exact = [name for name in names if name.lower() == part]
        found = exact or [name for name in names if part in name.lower()]
        if not found:
            parser.error(f"nothing is called {part!r}; there are {', '.join(names)}")
        chosen += found
    return [name for name in names if name in chosen]


def main() -> None:
    options = read_options()
    load.raise_file_limit()
    load.pin(-1)
    print(machine(), flush=True)
    start = time.perf_counter()
    fanout = [name for name in options.names if name not in checks.CHECKS]
    chosen = [name for name in options.names if name in checks.CHECKS]
    main_count = max(options.readers, key=lambda count: (count == 1000, count))
    plan = options.readers + [main_count] * (options.rounds - 1)
    with tqdm(total=len(plan) * len(fanout) + len(chosen), leave=False) as progress:
        results, missing = measure_all(fanout, plan, options, progress)
        summaries = {key: summarize(rounds) for key, rounds in results.items()}
        facts, rows = run_checks(chosen, options, progress, missing)
    rows = ratios(summaries, main_count) + rows
    print("\n" + "\n\n".join(report(summaries, facts, rows, missing)))
    print(f"\nMeasured in {time.perf_counter() - start:.0f} s.")
    if options.plot and summaries:
        plot(summaries, main_count, options.plot)
        print(f"Drawn: {options.plot}")
    if options.json:
        figures = [
            {"readers": readers, "server": name, "rounds": results[readers, name]}
            | summary
            for (readers, name), summary in summaries.items()
        ]
        everything = {"machine": machine(), "fanout": figures, "chat": facts}
        everything |= {"ratios": rows, "missing": missing}
        options.json.write_text(json.dumps(everything, indent=1))


def run_checks(names, options, progress, missing) -> tuple[list, list]:
    facts, rows = [], []
    with contextlib.ExitStack() as stack:

        @functools.cache
        def mongodb() -> str:
            if options.quick:
                raise servers.Missing("MongoDB, because of --quick")
            return stack.enter_context(servers.mongodb())

        options.mongodb = mongodb
        for name in names:
            progress.set_description(name)
            try:
                for found in checks.CHECKS[name](options):
                    (facts if len(found) == 2 else rows).append(found)
            except (servers.Missing, load.LoadError, OSError) as error:
                missing[name] = str(error) or type(error).__name__
            progress.update()
    return facts, rows


def report(summaries, facts, rows, missing) -> list[str]:
    parts = []
    if summaries:
        parts.append(table(summaries))
    if facts:
        lines = [f"| {what} | {value} |" for what, value in facts]
        parts.append("\n".join(["| the chat | |", "|---|---|", *lines]))
    if rows:
        parts.append(ratio_table(rows))
    if summaries and all(count != 1000 for count, _ in summaries):
        parts.append("The targets are meant for 1,000 readers; those were others.")
    if missing:
        lines = [f"- {name}: {reason}" for name, reason in missing.items()]
        parts.append("\n".join(["Left out, in whole or in part:", *lines]))
    return parts


if __name__ == "__main__":
    main()
