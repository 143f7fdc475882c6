"""The demo's task trained with each engine: transformers, vLLM in the trainer's process, vLLM behind a server.

    .venv-vllm/bin/python -m benchmarks.vllm [--steps 144] [--engines transformers colocated server]

`make demo` makes the model, `make test-vllm` the environment.  All engines get the same options, problems and seeds;
their random numbers differ, so the runs differ by chance.  What an engine has shown is kept in --output, and the table
is made of all that is there: engines may run one by one.
"""

import argparse
import ctypes
import datetime
import importlib.metadata
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from benchmarks import compare
from examples import chain_sum, demo, smollm2

LONGEST = 128  # tokens of a problem and its answer
WARMING_UP = 8  # steps whose times do not count: kernels are chosen, servers compile
STARTING = 300.0  # seconds that a server may take to start
SERVER = ["--enforce-eager", "--max-model-len", str(LONGEST), "--max-num-seqs", "128"]
COLOCATED = {"enforce_eager": True, "max_num_seqs": 128, "kv_cache_memory_bytes": 2**28}
FLAGS = {
    "transformers": [],
    "colocated": [
        *("--use_vllm", "true", "--vllm_max_model_length", str(LONGEST)),
        *("--vllm_engine_kwargs", json.dumps(COLOCATED)),
    ],
    "server": ["--use_vllm", "true", "--vllm_mode", "server"],
}
PR_SET_PDEATHSIG = 1  # of Linux's prctl.h
PARTS = ("generate", "publish", "old_logps", "learn", "reward", "other")

Result = dict[str, Any]


def main() -> None:
    options = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    options.add_argument("--steps", type=int, default=144)
    options.add_argument(
        "--problems", type=int, default=200, help="held-out problems to measure on"
    )
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--engines", nargs="+", default=list(FLAGS), choices=list(FLAGS))
    options.add_argument(
        "--cache", type=Path, default=Path(".cache"), help="folder of the demo's model"
    )
    options.add_argument("--output", type=Path, default=Path("runs/vllm"))
    options.add_argument("--results", default="benchmarks/results")
    args = options.parse_args()
    os.environ |= {
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TORCHDYNAMO_DISABLE": "1",
    }
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    model = smollm2.prepared(args.cache)
    for engine in args.engines:
        folder = args.output / f"{engine}-{args.seed}"
        folder.mkdir(parents=True, exist_ok=True)
        result = run(engine, model, folder, args)
        (folder / "result.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    results = [json.loads(file.read_text()) for file in sorted(args.output.glob("*/result.json"))]
    results.sort(key=lambda result: (list(FLAGS).index(result["engine"]), result["seed"]))
    report(results, args)


def run(engine: str, model: Path, folder: Path, args: argparse.Namespace) -> Result:
    """Train with one engine, and measure."""
    measured = chain_sum.held_out(args.problems)
    rows = chain_sum.training_rows(demo.NUM_TRAINING_PROBLEMS, seed=args.seed, without=measured)
    problems = folder / "problems.jsonl"
    problems.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    precision = demo.precision()
    dtype = "bfloat16" if precision[-1:] == ["true"] else "float32"
    command = [
        *(
            sys.executable,
            "-m",
            "gmpo.cli",
            "train",
            "--config",
            str(demo.CONFIG),
            "--model",
            str(model),
        )
    ]
    command += [
        "--dataset",
        str(problems),
        "--output_dir",
        str(folder),
        "--max_steps",
        str(args.steps),
    ]
    command += ["--seed", str(args.seed), *precision, *FLAGS[engine]]
    with server(model, dtype, folder) if engine == "server" else nullcontext([]) as address:
        start = time.perf_counter()
        subprocess.run([*command, *address], check=True, preexec_fn=end_with_parent)
        seconds = time.perf_counter() - start
    answers = demo.greedy_answers(folder, [problem["prompt"] for problem in measured])
    shares = demo.rates(answers, measured)
    return {
        "engine": engine,
        "seed": args.seed,
        "seconds": seconds,
        "dtype": dtype,
        **shares,
        **logged(folder),
    }


@contextmanager
def server(model: Path, dtype: str, folder: Path) -> Iterator[list[str]]:
    """Run a server of the model; yield the flags that name it."""
    with socket.socket() as it:
        it.bind(("127.0.0.1", 0))
        port = it.getsockname()[1]
    command = [
        *(
            sys.executable,
            "-m",
            "gmpo.cli",
            "serve",
            str(model),
            "--port",
            str(port),
            "--dtype",
            dtype,
        ),
        *SERVER,
    ]
    with open(folder / "server.log", "wb") as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=log, start_new_session=True, preexec_fn=end_with_parent
        )
    try:
        yield ["--vllm_server_port", str(port), "--vllm_server_timeout", str(STARTING)]
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(60)


def end_with_parent() -> None:
    """Have this child get SIGTERM when its parent ends, even if that was killed, before it becomes its program."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def logged(folder: Path) -> Result:
    """Return the seconds per step and their parts after the first steps, the reward of the last quarter, how far logs differ."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "step_time" in line]
    late = [line for line in steps if line["step"] > WARMING_UP]
    last = [line["rewards/verifier/mean"] for line in steps if "rewards/verifier/mean" in line]
    difference = "sampling/sampling_logp_difference/mean"
    return {
        "step": mean(late, "step_time"),
        **{part: mean(late, f"time/{part}") for part in PARTS},
        "tokens": mean(late, "tokens_per_second/generate"),
        "score": statistics.mean(last[-len(last) // 4 :]),
        "difference": mean(late, difference),
    }


def mean(lines: list[Result], name: str) -> float:
    return statistics.mean(line.get(name, 0.0) for line in lines)


def report(results: list[Result], args: argparse.Namespace) -> None:
    """Print the table, and write it with the machine and the command."""
    text = compare.table(results, COLUMNS)
    print(text)
    machine = f"{compare.cpu()}, {os.cpu_count()} cores, no GPU, {results[0]['dtype']}"
    page = (
        "# The demo's task by engine\n\n"
        f"SmolLM2-135M-Instruct on sums, {args.steps} optimizer steps of 128 completions, "
        f"4 per collection; {args.problems} held-out problems, greedy.\n{datetime.date.today().isoformat()}, "
        f"`python -m benchmarks.vllm --steps {args.steps}`, vLLM {importlib.metadata.version('vllm-cpu')}, {machine}.\n"
        f"Seconds are means per optimizer step after the first {WARMING_UP}; the server shares the processor with the "
        f"trainer.\n\n{text}"
    )
    Path(args.results, "vllm.md").write_text(page, encoding="utf-8")


def cell(name: str, form: str) -> Any:
    return lambda result: form.format(result[name])


COLUMNS = {
    "engine": cell("engine", "{}"),
    "seed": cell("seed", "{}"),
    "right number and nothing else": cell("exact", "{:.1%}"),
    "reward, last quarter": cell("score", "{:.3f}"),
    "log-prob difference, nats": cell("difference", "{:.4f}"),
    "step, s": cell("step", "{:.2f}"),
    **{f"{part}, s": cell(part, "{:.3f}") for part in PARTS},
    "tokens/s generating": cell("tokens", "{:.0f}"),
    "whole run, s": cell("seconds", "{:.0f}"),
}

if __name__ == "__main__":
    main()
