"""Whole runs: train or resume, export, sweeps, plans, the quickstart.

No mathematics: it puts the other packages together.
"""
