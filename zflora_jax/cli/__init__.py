"""The command line: one module per command, with its options and its calls.

It has no logic that a notebook would miss, and imports nothing heavy before a command runs.
"""
