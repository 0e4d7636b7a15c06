"""Errors that several packages raise."""


class NonFiniteError(RuntimeError):
    """NaN or infinity where none may be: in a loss, gradient or update of training (that state is
    not saved), in a held-out loss (the state itself is finite and may have been saved), or in the
    logits of a model that generates.
    """
