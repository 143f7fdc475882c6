"""The `gmpo` command: one file per command.

main.py       finds the command, and turns errors into one message
help.py       the text of gmpo train --help, made without heavy imports
options.py    what gmpo train takes beside the trainer's options
train.py      gmpo train: from a YAML file and flags to a trained model
parse.py      options from YAML and flags
yaml_text.py  YAML 1.2
datasets.py   rows from files, folders, the hub and reasoning-gym
dry_run.py    what would run, without running it
serve.py      gmpo serve: a vLLM server that a trainer can give weights to
env.py        gmpo env: versions and devices for a bug report
"""
