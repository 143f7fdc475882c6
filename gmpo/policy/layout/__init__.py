"""Where tokens are placed for a forward pass.

A prompt P with completions A and B, and a prompt Q with completion C:

    shared_prefix   P A B B B Q Q C        each prompt once, then its completions, all in one row
    packed          P A P B B B Q Q C      rows one after another
    padded          P A . .                one row per completion, padded
                    P B B B
                    Q Q C .

layout.py     the three layouts, and the tensors of a batch in one of them
attention.py  attention by segments inside of a model, for the layouts of one row
select.py     the layout that a model gets, checked against `padded`
chunks.py     sets of rows that fit into one forward pass
"""
