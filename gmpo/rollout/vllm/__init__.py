"""vLLM, in the training process or behind servers.

colocated.py  an engine in this process
server.py     an engine behind servers
start.py      how `gmpo serve` starts a server
llm.py        how vLLM's LLM is started in this process
sampling.py   our sampling options as vLLM's
errors.py     the error of everything that vLLM did not do
http/         requests to servers
transfer/     weights on their way into vLLM
inside/       what runs in vLLM's own processes
"""
