"""Rollouts in, rewards and advantages out.

sources.py       what scores: functions, reward models (reward_model.py), or anything with a name and a `score`
scoring.py       asks every source about the completions of this rank
advantages.py    rewards of all ranks -> advantages; pure
builtin.py       rewards that have a name on the command line (math_judge.py verifies mathematics, in its own process)
"""
