"""Tokens and text out of a model: sampling, the token loop, beams, likelihoods, requests of several
tasks.

No training state and no files.
"""
