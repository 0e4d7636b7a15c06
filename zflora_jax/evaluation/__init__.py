"""Scores of a model: records of answers, statistics, contamination, the check of an export.

Nothing that trains.
"""
