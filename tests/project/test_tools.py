"""tools/: a tiny model; what the checks of other software read from its answers."""

from __future__ import annotations

from check_llama_cpp import CHUNK, nll, pieces
from support.models import tiny_model
from tiny_model import main as write_tiny_model

from zflora_jax import load_model, option_log_likelihoods


def test_the_tiny_model_of_contributing_fits_the_byte_tokenizer(tmp_path):
    write_tiny_model(str(tmp_path / "tiny"))
    model = load_model(str(tmp_path / "tiny"))
    assert len(model.tokenizer) <= model.config.vocab_size < 1000


def test_perplexities_count_every_token_but_the_first_of_a_piece():
    chunks = pieces(list(range(200)) * 6)
    assert [len(chunk) for chunk in chunks] == [CHUNK, CHUNK]
    short, model = [chunk[:9] for chunk in chunks], tiny_model()
    want = option_log_likelihoods(model, [c[:1] for c in short], [[c[1:]] for c in short])
    assert abs(nll(model, short) + sum(float(row[0]) for row in want) / 16) < 1e-4
