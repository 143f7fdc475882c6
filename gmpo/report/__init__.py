"""Reports of what happened, for people and programs: metrics, completions, cards, plots.

metrics.py      figures on their way to the log; where the seconds go
completions.py  what the policy wrote and how it was scored
jsonl.py        metrics.jsonl, one line per log
parquet.py      tables of completions on disk
tables.py       tables on the console and for trackers
progress.py     lines on the console of the command line
plots.py        training curves as a picture
model_card.py   README.md of a trained model
settings.py     options of this stage
"""
