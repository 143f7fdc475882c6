"""A run's life: its folder and identity, its checkpoints, and what ends it.

folder.py          whose files an output folder holds, and which checkpoint a resume takes
checkpoint.py      state beside the Trainer's own, written whole or not at all, with digests
resumable.py       the Trainer's saving and loading: a resumed run equals an uninterrupted one
resume_options.py  options that may change on a resume, and those that may not
signals.py         SIGTERM, SIGINT and SIGHUP, noted and acted upon between steps
"""
