"""Adapters as transforms of parameter trees: methods, counts, initial values, fuse, swap, pack,
several tasks.

No forward pass: what a method computes beside the base is in nn.
"""
