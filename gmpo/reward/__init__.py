"""Rollouts in, rewards and advantages out.

types.py          what a reward is asked, and what anything that scores looks like
sources.py        functions, reward models and names as reward sources
score.py          ask every source about the completions of this rank
advantages.py     rewards of all ranks to advantages; pure
by_name.py        the table of named rewards, and functions named by file or module
builtin.py        rewards that have a name
reasoning_gym.py  tasks of reasoning-gym and their verifiers
math_judge.py     verifies mathematics, in its own process
text.py           what rewards read in completions and gold answers
reward_model.py   sequence classifiers as rewards
settings.py       options of this stage
"""
