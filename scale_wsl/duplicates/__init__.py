"""Duplicates between a training set and an evaluation set: features, exact search, and a report to judge them by."""
