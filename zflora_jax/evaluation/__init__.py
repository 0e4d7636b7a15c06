"""Scores of a model: records of answers, intervals, contamination, the check of an export.

Nothing here trains.
"""
