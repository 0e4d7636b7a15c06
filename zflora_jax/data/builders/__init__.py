"""Rows of a task from files, public datasets and generators, as TFDS builders and data sources."""
