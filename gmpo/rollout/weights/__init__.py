"""The policy's weights for engines that hold a copy of them.

version.py    counts the states of the policy's weights
named.py      whole tensors, one at a time, under checkpoint names
adapters.py   adapters, merged out of place or written as PEFT does
quantized.py  weights of 4 or 8 bits, dequantised
"""
