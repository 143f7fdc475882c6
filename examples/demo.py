"""A 135M chat model learns to answer sums with the right number and nothing else, on a laptop.

    make demo        or        python -m examples.demo --cache .cache

SmolLM2-135M-Instruct answers "9 - 1 =" in sentences, and is mostly wrong.  `gmpo train`
(examples/demo.yaml) trains it on reasoning-gym's `chain_sum`, in minutes on two CPU cores.
Accuracy is measured before and after, on problems that it was not trained on.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from examples import chain_sum, smollm2

CONFIG = Path(__file__).with_suffix(".yaml")
NUM_TRAINING_PROBLEMS = 2000
SAMPLES = 5


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # everything is here
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    model = smollm2.prepared(options.cache)
    measured = chain_sum.held_out(options.problems)
    options.output.mkdir(parents=True, exist_ok=True)
    rows = chain_sum.training_rows(NUM_TRAINING_PROBLEMS, seed=options.seed, without=measured)
    problems = options.output / "problems.jsonl"
    problems.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")

    print(f"Before: answering {len(measured)} held-out problems ...", flush=True)
    before = greedy_answers(model, [problem["prompt"] for problem in measured])
    train(model, problems, options)
    print(f"\nAfter: answering {len(measured)} held-out problems ...", flush=True)
    after = greedy_answers(options.output, [problem["prompt"] for problem in measured])

    accuracy = {"before": rates(before, measured), "after": rates(after, measured)}
    (options.output / "accuracy.json").write_text(
        json.dumps(accuracy, indent=2) + "\n", encoding="utf-8"
    )
    print(
        table(accuracy, len(measured)),
        samples(measured, before, after),
        closing(options.output),
        sep="\n\n",
    )


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m examples.demo", description=str(__doc__).splitlines()[0]
    )
    parser.add_argument(
        "--steps", type=at_least_one, help="optimizer steps (default: those of demo.yaml)"
    )
    parser.add_argument(
        "--problems", type=at_least_one, default=200, help="held-out problems to measure on"
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="of the training: its problems and its sampling"
    )
    parser.add_argument(
        "--cache", type=Path, default=Path(".cache"), help="folder for the converted model"
    )
    parser.add_argument(
        "--output", type=Path, default=Path("runs/demo"), help="folder for everything that is made"
    )
    return parser.parse_args(arguments)


def at_least_one(text: str) -> int:
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is below 1")
    return int(text)


def train(model: Path, problems: Path, options: argparse.Namespace) -> None:
    """Run `gmpo train` and show it."""
    command = [
        "train",
        "--config",
        CONFIG,
        "--model",
        model,
        "--dataset",
        problems,
        "--output_dir",
        options.output,
    ]
    command += [
        "--seed",
        options.seed,
        *(["--max_steps", options.steps] if options.steps else []),
        *precision(),
    ]
    words = [str(word) for word in command]
    print("\n$ gmpo " + " ".join(words), flush=True)
    finished = subprocess.run([sys.executable, "-m", "gmpo.cli", *words])
    if finished.returncode:
        sys.exit(finished.returncode)  # it has said why


def precision() -> list[str]:
    """Return flags for mixed precision where bfloat16 is faster than float32 on this processor.

    With a GPU there are no flags: gmpo takes bfloat16 by itself.
    """
    import torch

    if torch.cuda.is_available():
        return []
    return [
        "--use_cpu",
        "true",
        "--bf16",
        str(seconds(torch.bfloat16) < seconds(torch.float32)).lower(),
    ]


def seconds(dtype: Any) -> float:
    """Return the time of a matrix product of the model's size, the best of five."""
    import torch

    left, right = torch.ones(512, 576, dtype=dtype), torch.ones(576, 1536, dtype=dtype)
    times = []
    for _ in range(5):
        start = time.perf_counter()
        left @ right
        times.append(time.perf_counter() - start)
    return min(times)


# -- measuring -----------------------------------------------------------------------------------


def greedy_answers(
    model_folder: Path, questions: Sequence[str], *, max_new_tokens: int = 32, rows: int = 50
) -> list[str]:
    """Return the most probable answer to each question, by transformers' own `generate`."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    tokenizer: Any = AutoTokenizer.from_pretrained(model_folder, padding_side="left")
    model: Any = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    answers: list[str] = []
    for start in range(0, len(questions), rows):
        conversations = [
            [{"role": "user", "content": question}] for question in questions[start : start + rows]
        ]
        inputs = tokenizer.apply_chat_template(
            conversations,
            add_generation_prompt=True,
            padding=True,
            return_dict=True,
            return_tensors="pt",
        )
        tokens = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
        answers += tokenizer.batch_decode(
            tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True
        )
    return answers


def rates(answers: Sequence[str], problems: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Return the shares of answers that are the right number, and that hold it anywhere."""
    pairs = [(answer, problem["answer"]) for answer, problem in zip(answers, problems, strict=True)]
    return {
        "exact": sum(chain_sum.exact(*pair) for pair in pairs) / len(pairs),
        "found": sum(chain_sum.found(*pair) for pair in pairs) / len(pairs),
    }


# -- telling -------------------------------------------------------------------------------------


def table(accuracy: dict[str, dict[str, float]], count: int) -> str:
    names = {"exact": "the right number and nothing else", "found": "the right number anywhere"}
    lines = [f"{f'{count} held-out problems, greedy':<36}{'before':>8}{'after':>8}"]
    for key, name in names.items():
        lines.append(f"{name:<36}{accuracy['before'][key]:>8.1%}{accuracy['after'][key]:>8.1%}")
    return "\n".join(lines)


def samples(problems: Sequence[dict[str, Any]], before: Sequence[str], after: Sequence[str]) -> str:
    """Return a few problems with both answers, each on one line."""
    lines = [f"{'problem':<12}{'before':<64}after"]
    for problem, old, new in list(zip(problems, before, after, strict=True))[:SAMPLES]:
        expression = problem["prompt"].rpartition(":")[2].strip()
        lines.append(f"{expression:<12}{on_one_line(old):<64}{on_one_line(new)}")
    return "\n".join(lines)


def on_one_line(text: str, width: int = 60) -> str:
    text = " ".join(text.split())
    return text if len(text) <= width else f"{text[: width - 3]}..."


def closing(output: Path) -> str:
    load = f'model = AutoModelForCausalLM.from_pretrained("{output}")'
    return "\n".join(
        [
            f"curves  {output / 'training_curves.png'}",
            "",
            "from transformers import AutoModelForCausalLM",
            load,
        ]
    )


if __name__ == "__main__":
    main()
