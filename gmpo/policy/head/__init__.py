"""From hidden states to log-probs, entropies and losses.

Logits [rows, vocabulary] are the largest tensor of a step, 150,000 numbers per token.  So they are
made for a tile of rows at a time, turned into what is wanted of them, and thrown away.

lm_head.py         the head of a model: finding it, replacing it, what the model does to its logits
chunked.py         log-probs and entropies, a tile at a time, with their gradients
fused.py           the loss and its gradient while a tile's logits are there
onednn.py          float32 products on CPUs through oneDNN
logits_shaping.py  what the sampler did to logits, done again
"""
