"""Dataset rows, dealt to the ranks: groups, collections, micro-batches.

sampler.py        which rows every rank gets, and when; sizes of a collection
loaders.py        data loaders around the sampler, for training and evaluation
micro_batches.py  which rows of a collection each micro-step trains on
resample.py       other prompts for groups without signal
settings.py       options of this stage
"""
