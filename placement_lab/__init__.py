"""Predictors, planners, splits and triggers replayed on recorded routing, without weights: tools/popularity_lab.py."""
