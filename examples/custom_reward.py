"""A reward of your own, for the command line:

    gmpo train --model .cache/SmolLM2-135M-Instruct --dataset reasoning_gym:chain_sum \\
        --reward examples/custom_reward.py:close_to_the_answer

or for Python: `GMPOTrainer(model, reward_funcs=close_to_the_answer, ...)`.
"""

import re


def close_to_the_answer(completions, answer, log_metric, **columns):
    """Return 1 for the right number, less the farther the last number is from it, 0 without one.

    Args:
        completions: One per row: text, or a list of messages where the prompt is one.
        answer: A column of the dataset.  Every column comes under its name; `**columns` takes the
            rest.
        log_metric: Takes a name and a value; the mean of the values is logged.

    Returns:
        A number for each completion; None would leave it unscored.
    """
    rewards = []
    for completion, gold in zip(completions, answer, strict=True):
        text = completion if isinstance(completion, str) else completion[-1]["content"]
        numbers = re.findall(r"-?\d+", text)
        rewards.append(1 / (1 + abs(int(numbers[-1]) - int(gold))) if numbers else 0.0)
    log_metric("close/without_number", rewards.count(0.0) / len(rewards))
    return rewards
