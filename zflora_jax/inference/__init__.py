"""Tokens and text out of a model: sampling, the token loop, likelihoods.

There are no training state and no files here.
"""
