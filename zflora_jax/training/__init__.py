"""The training step and its loop with hooks: loss, optimizers, checkpoints, a run's directory.

No evaluation of answers and no export: whole runs are in experiments.
"""
