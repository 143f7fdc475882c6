"""Attention of rows of segments, without masks: what sampling and learning share.

A row holds prompts and the completions that continue them.  A prompt sees itself causally, a
completion sees itself causally and its prompt in full.  Both parts are computed apart and merged by
their log-sum-exps, which is exact:

    o = (e^a o_prompt + e^b o_own) / (e^a + e^b),    a, b = log-sum-exp of the scores of either part

segments.py  the queries and keys that meet: runs of tokens, cut into calls of a kernel
kernels.py   attention of queries to keys, with its log-sum-exp, forward and backward
varlen.py    on CUDA: flash attention for sequences of unequal lengths, in 16 bits
flex.py      on CUDA where that does not serve: FlexAttention, its block mask made of segments
merge.py     merging by log-sum-exp, and sinks
attend.py    attention of a row of segments as one differentiable function
door.py      the way of transformers' layers to us: a name in their config, their window
"""
