"""Requests to vLLM servers.

channel.py  one address: connections, deadlines, answers
client.py   one server: what it is, what it is asked
fleet.py    several servers as one
tokens.py   the secret that a server and its trainer share
"""
