"""Requests to vLLM servers.

channel.py  one address: connections, deadlines, answers
client.py   one server: what it is, what it is asked
fleet.py    several servers as one
pull.py     requests as they come, samples as they are finished
samples.py  samples, as the parts of a streamed answer add to them
tokens.py   the secret that a server and its trainer share
"""
