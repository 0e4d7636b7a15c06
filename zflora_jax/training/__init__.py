"""The training step and its loop: loss, optimizer, checkpoints.

No evaluation of answers and no export: whole runs are in experiments.
"""
