"""Engines around the trainer's own module.

shared_prefix.py       each prompt is read once for its group
decoder.py             the decoding loop: requests come, rows enter and leave
cache.py               keys and values of prompts and rows, and attention over them
memory.py              how much memory keys and values take, and how much there is
sequence.py            a completion while it is being written
sampler.py             from logits to tokens
cuts.py                the tokens that top_k, top_p and min_p leave
repetition.py          the repetition penalty
draw.py                a token out of a distribution
generation_options.py  sampling in the terms of transformers' GenerationConfig
hf_generate.py         transformers' `generate`
hf_continuous.py       transformers' continuous batching
"""
