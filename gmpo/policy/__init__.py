"""Batches in; log-probs, or the gradient of a loss of them, out.

logprobs.py   LogProbs: lay a batch out, run the model around our own head
layout/       where tokens are placed for a forward pass
head/         from hidden states to log-probs and losses, without keeping logits
load.py       from a name, a path or a model to the policy
reference.py  the frozen policy of the KL term
memory.py     the size of forward passes, and its repair where memory runs out
moe.py        the load-balancing loss of mixtures of experts
settings.py   options of this stage
"""
