"""The `gmpo` command: one file per command.

main.py      finds the command, and turns errors into one message
train.py     gmpo train: from a YAML file and flags to a trained model
parse.py     options from YAML and flags
datasets.py  rows from files, folders, the hub and reasoning-gym
dry_run.py   what would run, without running it
serve.py     gmpo serve: a vLLM server that a trainer can give weights to
env.py       gmpo env: versions and devices for a bug report
"""
