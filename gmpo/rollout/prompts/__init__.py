"""Dataset rows to token ids, and completions back to text or messages.

encoder.py        PromptEncoder: rows to prompts, tokens to completions
chat_template.py  messages to token ids, and the text that a prompt leaves open
messages.py       what Arrow adds to messages, and what they may hold
dataset.py        checks of a dataset's rows
lengths.py        prompts that are longer than the model's context allows
model_facts.py    a model's context length, and the tokens that end and pad
"""
