"""Errors that several packages raise."""


class NonFiniteError(RuntimeError):
    """Numbers are NaN or infinite that must not be: a loss, a gradient or an update in training, of
    which no state was saved; a held-out loss, of a state that is a number itself and may be saved;
    the logits of a model that generates.
    """
