"""Code that runs in vLLM's own processes.

worker.py  receives weights; vLLM loads it as a plugin
guard.py   asks every request for the secret
names.py   names by which vLLM finds the two
"""
