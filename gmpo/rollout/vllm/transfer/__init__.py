"""Weights on their way into vLLM.

send.py      a publication: buckets of whole tensors, one after another
carriers.py  how a bucket travels: by reference, in files, over NCCL
folder.py    the folder of files, gone with the run
nccl.py      the trainer's end of an NCCL group
"""
