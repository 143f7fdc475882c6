"""Dataset rows to token ids, and completions back to text or messages.

encoder.py      PromptEncoder: chat template, tokens, decoding
dataset.py      checks of a dataset's rows
model_facts.py  a model's context length, and the tokens that end and pad
"""
