"""The training step and its loop with hooks: loss, optimizers, checkpoints, a run's directory.

Evaluation of answers, export and whole runs are in experiments.
"""
