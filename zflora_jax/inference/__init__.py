"""Tokens and text out of a model: sampling, the token loop, likelihoods.

No training state and no files.
"""
