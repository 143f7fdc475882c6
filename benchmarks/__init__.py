"""Measurements: gmpo beside the peer, in turn in one run.  Each file prints one table and writes it to results/."""
