"""Errors that several packages raise."""


class NonFiniteError(RuntimeError):
    """NaN or infinity where none may be: in a loss, gradient or update of training (that state is
    not saved), in a held-out loss (the state itself is finite and may have been saved), or in the
    logits of a model that generates.
    """


class CheckpointError(ValueError):
    """A file or directory of weights cannot be used; the message names it, the defect and, if there
    is one, the fix.
    """


class Preempted(RuntimeError):
    """A signal ended the run after a step; its state is saved, and the same command resumes it."""
