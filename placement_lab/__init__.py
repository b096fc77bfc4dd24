"""What labs and papers alone need of placements: predictors, planners, splits and triggers replayed on recorded or made routing,
without weights (tools/popularity_lab.py), and inference batches in virtual time (serving/)."""
