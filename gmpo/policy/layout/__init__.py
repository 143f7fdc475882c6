"""Where tokens are placed for a forward pass.

A prompt P with completions A and B, and a prompt Q with completion C:

    padded          P A . .        one row per completion, padded
                    P B B B
                    Q Q C .
    packed          P A P B B B    rows one after another, without padding
                    Q Q C . . .
    shared_prefix   P A B B B .    each prompt once, then its completions
                    Q Q C . . .

layout.py  the three layouts, and the tensors of a batch in one of them
select.py  the cheapest layout that a model supports, checked against `padded`
masks.py   attention masks of a layout
chunks.py  sets of rows that fit into one forward pass
"""
