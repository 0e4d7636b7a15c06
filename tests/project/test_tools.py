"""tools/: what the checks of other software read (the tiny model: test_release.py)."""

import numpy as np
from check_consumers import scores
from support.models import tiny_model

from zflora_jax import option_log_likelihoods


def test_scores_count_every_token_but_the_first_of_a_piece():
    model, rows = tiny_model(), [list(range(9)), list(range(100, 109))]
    want = option_log_likelihoods(model, [row[:1] for row in rows], [[row[1:]] for row in rows])
    assert np.allclose([[sum(row)] for row in scores(model, rows)["logp"]], want, atol=1e-4)
