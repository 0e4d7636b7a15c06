"""Adapters as transforms of parameter trees: the table of methods, initial values, fusing and its inverse."""
