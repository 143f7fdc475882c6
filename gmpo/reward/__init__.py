"""Rollouts in, rewards and advantages out.

types.py          what a reward is asked, and what anything that scores looks like
sources.py        functions, reward models and names as reward sources
functions.py      a user's function as a source, here or in worker processes
score.py          ask every source about the completions of this rank
answers.py        checks of what a source answered
advantages.py     rewards of all ranks to advantages; pure
by_name.py        the table of named rewards, and functions named by file or module
builtin.py        rewards that have a name
code.py           the reward that runs a completion's program against tests
sandbox.py        runs in that program's process
reasoning_gym.py  tasks of reasoning-gym and their verifiers
math_judge.py     verifies mathematics, in worker processes
text.py           what rewards read in completions and gold answers
pool.py           worker processes with limits of time and memory
worker.py         runs in such a process
reward_model.py   sequence classifiers as rewards
settings.py       options of this stage
check.py          rules between them
"""
