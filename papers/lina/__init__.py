"""Lina (ATC'23) beside the library: the paper's numbers simulated one by one (docs/reproduction.md, tools/reproduce_lina.py), and
what all-to-alls cost a model, as its sections 2 and 4 ask (tools/analyze_alltoall.py)."""
