"""The command line: one module per command, with its options and what it calls.

No logic that a notebook would miss, and nothing heavy before a command runs.
"""
