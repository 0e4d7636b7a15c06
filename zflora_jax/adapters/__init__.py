"""Adapters as transforms of parameter trees: methods, counts, initial values, fuse, swap, pack.

There is no forward pass here: nn computes unmerged adapters.
"""
