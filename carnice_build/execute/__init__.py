"""Doing the work of a plan: jobs, workers, budget and progress."""
