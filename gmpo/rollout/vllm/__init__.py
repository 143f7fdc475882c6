"""vLLM, in the training process or behind servers.

colocated.py  vLLM in this process
server.py     vLLM behind servers
sampling.py   our sampling options as vLLM's
errors.py     what vLLM did not do
http/         requests to servers
transfer/     weights on their way into vLLM
inside/       what runs in vLLM's own processes
"""
