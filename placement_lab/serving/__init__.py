"""Inference batches in virtual time: what is decided (decisions.py), what it takes (seconds.py), the walk (simulator.py)."""
