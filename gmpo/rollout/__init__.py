"""Prompts in, rollouts out, by an Engine.

engine.py           the contract: Request, Sampling, Completion, Engine
sampling.py         settings to how to sample
build.py            settings to engine, one table
exactness.py        does an engine compute what is trained
generation_mode.py  the trainer's module, lent out for generation
prompts/            dataset rows to token ids, and back to text
weights/            the policy's weights for engines with a copy of them
local/              engines around the trainer's own module
vllm/               vLLM, in the training process or behind servers
check.py            combinations of options that can't act together
settings.py         options of this stage
"""
