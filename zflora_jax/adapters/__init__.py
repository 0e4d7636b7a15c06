"""Adapters as transforms of parameter trees: methods, counts, initial values, fuse, swap, pack.

No forward pass: the computation of adapters beside the base is in nn.
"""
