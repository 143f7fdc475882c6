"""Engines around the trainer's own module.

shared_prefix.py  each prompt is read once for its group
checked.py        the shared-prefix engine with a fallback to `generate`
decoder.py        the decoding loop: rows enter and leave
cache.py          keys and values of prompts and rows, and attention over them
sequence.py       a completion while it is being written
sampler.py        from logits to tokens
hf_generate.py    transformers' `generate`
hf_continuous.py  transformers' continuous batching
"""
