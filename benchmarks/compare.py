"""Run the sides in turn, and write down what they took."""

import argparse
import contextlib
import datetime
import os
import platform
import re
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers

from benchmarks.peer import MISSING, ROOT, Worker, peer_python

DISTURBED = 0.1  # share of the processors that others may take during a round
TRIES = 2  # of a round

Replies = dict[str, list[dict[str, Any]]]  # side -> what it said in each round


@dataclass(frozen=True)
class Side:
    """One of those that are compared: a program in a Python, and what only this one is told."""

    python: str
    arguments: Mapping[str, Any] = field(default_factory=dict)


def options(description: str | None, *, rounds: int = 5) -> argparse.ArgumentParser:
    """Return a parser with the options that all benchmarks have."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=rounds, help="measured rounds of each side")
    parser.add_argument("--warmup", type=int, default=1, help="rounds before, not measured")
    parser.add_argument(
        "--results", default=str(ROOT / "benchmarks" / "results"), help="folder of the results"
    )
    parser.add_argument(
        "--label", default="", help="tells sections of one benchmark with different options apart"
    )
    return parser


def model_options(description: str | None, *, rounds: int = 5) -> argparse.ArgumentParser:
    """Return a parser that also has the options of the benchmarks that run a model."""
    parser = options(description, rounds=rounds)
    parser.add_argument(
        "--model",
        help="name or path; default: the demo's SmolLM2-135M, made in .cache where missing",
    )
    parser.add_argument("--bf16", action="store_true", help="mixed precision; default: float32")
    parser.add_argument(
        "--gradient-checkpointing", action="store_true", help="on both sides; default: off"
    )
    return parser


def model_folder(args: argparse.Namespace) -> str:
    if args.model is not None:
        return args.model
    from examples.smollm2 import prepared

    return str(prepared(ROOT / ".cache"))


def both(**arguments: Any) -> dict[str, Side]:
    """Return the sides that can run, gmpo first; say on the console if the peer can't."""
    sides = {"gmpo": Side(sys.executable, {"side": "gmpo", **arguments})}
    peer = peer_python()
    if peer is None:
        print(MISSING, file=sys.stderr)
        return sides
    return sides | {"peer": Side(peer, {"side": "peer", **arguments})}


def alternate(program: str, sides: Mapping[str, Side], *, rounds: int, warmup: int) -> Replies:
    """Run A B A B: every side once per round, each in a process that stays alive and waits while the other one works."""
    replies: Replies = {side: [] for side in sides}
    with contextlib.ExitStack() as stack:
        workers = {
            name: stack.enter_context(Worker(side.python, program, **side.arguments))
            for name, side in sides.items()
        }
        for round in range(-warmup, rounds):
            for side, worker in workers.items():
                reply = undisturbed(
                    lambda worker=worker: worker.ask(go=True),
                    worker.pid,
                    tries=TRIES if round >= 0 else 1,
                )
                if round >= 0:
                    replies[side].append(reply)
                print(
                    f"{program}, round {round}, {side}: {reply['seconds']:.3g} s",
                    file=sys.stderr,
                    flush=True,
                )
    return replies


def undisturbed(work: Callable[[], Any], pid: int, *, tries: int = TRIES) -> Any:
    """Return what `work` gives, done again where other processes than `pid` have taken a part of the processors meanwhile."""
    while True:
        tries -= 1
        before, start = others_seconds(pid), time.perf_counter()
        result = work()
        share = (others_seconds(pid) - before) / (
            (time.perf_counter() - start) * (os.cpu_count() or 1)
        )
        if share <= DISTURBED or tries <= 0:
            return result
        print(
            f"disturbed: other processes took {share:.0%} of the processors; again",
            file=sys.stderr,
            flush=True,
        )


def others_seconds(pid: int) -> float:
    """Processor time that all processes but `pid` have taken so far; 0 on systems that don't tell."""
    tick = os.sysconf("SC_CLK_TCK") if hasattr(os, "sysconf") else 1
    try:
        user, nice, system = map(int, Path("/proc/stat").read_text().split()[1:4])
        own = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except OSError:
        return 0.0
    return (user + nice + system - int(own[11]) - int(own[12])) / tick


# -- cells of a table --------------------------------------------------------------------------------------------------


def median(replies: Replies, side: str, name: str) -> float:
    """Return the median over the rounds; NaN for a side that did not run."""
    return (
        statistics.median(reply[name] for reply in replies[side])
        if side in replies
        else float("nan")
    )


def number(replies: Replies, side: str, name: str, *, per: float = 1.0) -> str:
    return f"{median(replies, side, name) / per:.3g}" if side in replies else "-"


def seconds(replies: Replies, side: str) -> str:
    """Median, smallest and largest."""
    return spread([reply["seconds"] for reply in replies[side]]) if side in replies else "-"


def spread(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.3g} ({min(values):.3g}-{max(values):.3g})"


def ratio(
    replies: Replies, name: str = "seconds", *, over: str = "peer", under: str = "gmpo"
) -> str:
    """Return the median of the side `over`, divided by the median of the side `under`."""
    return (
        f"{median(replies, over, name) / median(replies, under, name):.2f}"
        if over in replies
        else "-"
    )


def gigabytes(replies: Replies, side: str) -> str:
    return f"{peak(replies, side) / 1e9:.2f}" if side in replies else "-"


def peak_share(replies: Replies) -> str:
    """Return gmpo's peak memory in units of the peer's."""
    return f"{peak(replies, 'gmpo') / peak(replies, 'peer'):.2f}" if "peer" in replies else "-"


def peak(replies: Replies, side: str) -> float:
    return max(reply["peak_bytes"] for reply in replies[side])


def table(rows: Sequence[Any], columns: Mapping[str, Callable[[Any], str]]) -> str:
    """Return a Markdown table: one line per row, each column a function of it."""
    lines = [
        list(columns),
        ["---"] * len(columns),
        *([column(row) for column in columns.values()] for row in rows),
    ]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


# -- the file of results -----------------------------------------------------------------------------------------------


def report(name: str, title: str, text: str, args: argparse.Namespace) -> Path:
    """Print `text`, and put it into results/<date>-<device>.md, in the place of an older section of the same name."""
    command = shlex.join(["python", "-m", f"benchmarks.{name}", *without_folder(sys.argv[1:])])
    heading = f"{name}, {args.label}" if args.label else name
    section = f"## {heading}\n\n{title}\n\n`{command}`\n\n{text.rstrip()}\n"
    print(section)
    path = Path(args.results, f"{run_name()}.md")
    path.parent.mkdir(parents=True, exist_ok=True)
    sections = read_sections(path)
    sections[heading] = section
    path.write_text("\n".join([header(), *sections.values()]), encoding="utf-8")
    print(f"Written to {path}", file=sys.stderr)
    return path


def without_folder(arguments: Sequence[str]) -> list[str]:
    """Return the command line without where the results and the model lie on this machine."""
    text = " ".join(arguments)
    return re.sub(r"--(results|model)[ =](\S*/\S*)", "", text).split()


def run_name() -> str:
    """Return the name of a run's file: one per day and device."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return f"{datetime.date.today().isoformat()}-{'-'.join(device.lower().split())}"


def read_sections(path: Path) -> dict[str, str]:
    """Return what a file of results holds already, by heading."""
    if not path.exists():
        return {}
    parts = re.split(r"(?m)^## ", path.read_text(encoding="utf-8"))[1:]
    return {part.split("\n", 1)[0]: f"## {part.rstrip()}\n" for part in parts}


def header() -> str:
    on_gpu = torch.cuda.is_available()
    device = torch.cuda.get_device_name() if on_gpu else cpu()
    memory = (
        "allocated on the GPU"
        if on_gpu
        else "resident, of the whole process with Python and libraries"
    )
    return (
        f"# Measurements of {datetime.date.today().isoformat()}\n\n"
        f"{device}, {os.cpu_count()} cores; Python {platform.python_version()}, torch {torch.__version__}, "
        f"transformers {transformers.__version__}. The peer is TRL 1.16.0.\n\n"
        "Seconds are medians (smallest-largest) of rounds in which the sides take turns, after a round to warm up. "
        f"Rounds in which other processes took more than {DISTURBED:.0%} of the processors were repeated. "
        f"Peak memory: {memory}.\n"
    )


def cpu() -> str:
    """Return the processor's name, as far as the system tells."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
