"""Whole runs: train or resume, export, sweeps, plans, the quickstart.

It combines the other packages and has no mathematics of its own.
"""
