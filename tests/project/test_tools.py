"""tools/: what the checks of other software read (the tiny model: test_release.py)."""

import sys

import litert
import numpy as np
import pytest
from check_consumers import scores
from support.models import tiny_model

from zflora_jax import option_log_likelihoods


def test_scores_count_every_token_but_the_first_of_a_piece():
    model, rows = tiny_model(), [list(range(9)), list(range(100, 109))]
    want = option_log_likelihoods(model, [row[:1] for row in rows], [[row[1:]] for row in rows])
    assert np.allclose([[sum(row)] for row in scores(model, rows)["logp"]], want, atol=1e-4)


@pytest.mark.parametrize(
    ("out", "words"),
    [("x.gguf", "ends in .litertlm"), ("old.tflite", "exists"), ("x.tflite", "no config.json")],
)
def test_a_litert_file_is_refused_before_it_is_made(out, words, tmp_path, monkeypatch, capsys):
    (tmp_path / "old.tflite").write_text("mine")
    monkeypatch.setattr(sys, "argv", ["litert.py", str(tmp_path), str(tmp_path / out)])
    with pytest.raises(SystemExit):
        litert.main()
    assert words in capsys.readouterr().err and (tmp_path / "old.tflite").read_text() == "mine"
