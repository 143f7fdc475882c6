"""Weights on their way into vLLM.

send.py  a publication: buckets of tensors, by reference or in files
nccl.py  buckets over NCCL
"""
