"""Run the sides in turn, and write down what they took."""

import argparse
import contextlib
import datetime
import os
import platform
import shlex
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

from benchmarks.peer import MISSING, ROOT, Worker, peer_python

Replies = dict[str, list[dict[str, Any]]]  # side -> what it said in each round


def parser(description: str | None) -> argparse.ArgumentParser:
    """The options that all benchmarks have."""
    options = argparse.ArgumentParser(description=description)
    options.add_argument("--model", help="name or path; default: the demo's SmolLM2-135M, made in .cache where missing")
    options.add_argument("--rounds", type=int, default=5, help="measured rounds of each side")
    options.add_argument("--warmup", type=int, default=1, help="rounds before, not measured")
    options.add_argument("--bf16", action="store_true", help="mixed precision; default: float32")
    options.add_argument("--gradient-checkpointing", action="store_true", help="on both sides; default: off")
    options.add_argument("--results", default=str(ROOT / "benchmarks" / "results"), help="folder of the results")
    return options


def model_folder(args: argparse.Namespace) -> str:
    if args.model is not None:
        return args.model
    from examples.smollm2 import prepared

    return str(prepared(ROOT / ".cache"))


def pythons() -> dict[str, str]:
    """The sides that can run, gmpo first; says on the console if the peer can't."""
    peer = peer_python()
    if peer is None:
        print(MISSING, file=sys.stderr)
        return {"gmpo": sys.executable}
    return {"gmpo": sys.executable, "peer": peer}


def alternate(program: str, *, rounds: int, warmup: int, **arguments: Any) -> Replies:
    """A B A B: every side once per round, each in a process that stays alive and waits while the other one works."""
    replies: Replies = {}
    with contextlib.ExitStack() as stack:
        workers = {
            side: stack.enter_context(Worker(python, program, side=side, **arguments))
            for side, python in pythons().items()
        }
        for round in range(-warmup, rounds):
            for side, worker in workers.items():
                reply = worker.ask(go=True)
                if round >= 0:
                    replies.setdefault(side, []).append(reply)
    return replies


def median(replies: Replies, side: str, name: str) -> float:
    """The median over the rounds; NaN for a side that did not run."""
    return statistics.median(reply[name] for reply in replies[side]) if side in replies else float("nan")


def seconds(replies: Replies, side: str) -> str:
    """Median, smallest and largest."""
    if side not in replies:
        return "-"
    taken = [reply["seconds"] for reply in replies[side]]
    return f"{statistics.median(taken):.3g} ({min(taken):.3g}-{max(taken):.3g})"


def ratio(replies: Replies, name: str = "seconds") -> str:
    """How often gmpo's median goes into the peer's."""
    return f"{median(replies, 'peer', name) / median(replies, 'gmpo', name):.2f}" if "peer" in replies else "-"


def gigabytes(replies: Replies, side: str) -> str:
    return f"{max(r['peak_bytes'] for r in replies[side]) / 1e9:.2f}" if side in replies else "-"


def table(rows: Sequence[Any], columns: dict[str, Callable[[Any], str]]) -> str:
    """A Markdown table: one line per row, each column a function of it."""
    lines = [list(columns), ["---"] * len(columns), *([column(row) for column in columns.values()] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def report(name: str, title: str, text: str, *, results: str) -> None:
    """Print `text`, and write it to results/<date>-<device>-<name>.md with the machine and the command."""
    date = datetime.date.today().isoformat()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    path = Path(results, f"{date}-{'-'.join(device.lower().split())}-{name}.md")
    command = shlex.join(["python", "-m", f"benchmarks.{name}", *sys.argv[1:]])
    memory = "allocated on the GPU" if torch.cuda.is_available() else "resident, of the whole process"
    machine = (
        f"{device if device != 'cpu' else cpu()}, {os.cpu_count()} cores; Python {platform.python_version()}, "
        f"torch {torch.__version__}, transformers {transformers.__version__}."
    )
    notes = f"Seconds are medians (smallest-largest) of rounds taken in turn. Peak memory: {memory}."
    print(text)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"# {title}\n\n{date}, `{command}`\n\n{machine}\n{notes}\n\n{text}", encoding="utf-8")
    print(f"Written to {path}", file=sys.stderr)


def cpu() -> str:
    """The processor's name, as far as the system tells."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
