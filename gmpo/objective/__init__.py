"""Log-probs and advantages in, a loss out: pure functions.

gmpo.py           Geometric-Mean Policy Optimization, the page to read first
family.py         FAMILY: every member in one table, and which one the options name
objective.py      selection, correction, surrogate, aggregate, KL and entropy bonus in their order
types.py          what goes into an objective and a surrogate, and what comes out
clipped.py        the clipped ratio per token: GRPO, DAPO, GSPO, ...
cispo.py          CISPO
sapo.py           SAPO
vespo.py          VESPO
per_token.py      what the members that charge each token share
aggregate.py      from tokens and rows to one number: every denominator
correction.py     weights for the mismatch of sampler and trainer
kl.py             divergence from the reference
selection.py      tokens and rows that receive policy gradient
entropy_bonus.py  the entropy bonus's coefficient
statistics.py     figures of a chunk, for the log
check.py          combinations of options that an objective can't use
settings.py       options of this stage
"""
