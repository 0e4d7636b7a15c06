"""The command line: options, and what each command calls.

No logic that a notebook would miss.
"""
