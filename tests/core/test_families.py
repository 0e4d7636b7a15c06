"""Every family equals its stock class: logits, padding, cache; all methods fuse, pack, swap and
unfuse on it; unsupported settings of a config.json are refused by name.
"""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from support.checks import assert_logits_close, assert_trees_equal
from support.exports import perturbed_adapters, tiny_family
from support.grids import always
from support.huggingface import TOKENS, hf_logits, hf_model, open_stock, write_gguf
from support.models import tiny_model

from zflora_jax import ConfigError, Llama, forward, generate_tokens, load_model, save_hf
from zflora_jax.adapters.fuse import fuse, swap, unfuse
from zflora_jax.adapters.packing import pack_for_decode
from zflora_jax.config import METHODS, PRESETS, AdapterConfig, LlamaConfig, preset
from zflora_jax.core import trees
from zflora_jax.core.families import FAMILIES
from zflora_jax.hf.config import from_hf_config, to_hf_config
from zflora_jax.hf.restore import load_stock

NEW = [name for name in FAMILIES if name != "llama"]
NOPE = {"no_rope_layers": [1, 0]}
WINDOW = {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 0}
# family -> settings of transformers that go through its branches. Tied or not, with as many key
# heads as query heads or fewer, with a window or without, at odd widths.
GRID: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"num_key_value_heads": 4, "tie_word_embeddings": True}),
    ("mistral", {"sliding_window": 5, "num_key_value_heads": 1}),
    ("mistral", {"sliding_window": None, "tie_word_embeddings": True}),
    ("qwen2", {"tie_word_embeddings": True}),
    ("qwen2", {**WINDOW, "num_key_value_heads": 4}),
    ("qwen3", {"head_dim": 20}),
    ("qwen3", {**WINDOW, "tie_word_embeddings": True, "num_key_value_heads": 1}),
    ("smollm3", NOPE),
    ("smollm3", {**NOPE, "tie_word_embeddings": True, "num_key_value_heads": 4}),
]
ALWAYS = (GRID[1], GRID[4], GRID[6], GRID[8])


# --- parity ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "settings"), always(GRID, lambda case: case in ALWAYS))
def test_logits_and_decoded_tokens_equal_transformers(family, settings, tmp_path) -> None:
    reference = hf_model(family=family, **settings)
    reference.save_pretrained(tmp_path)
    model = load_model(tmp_path)
    assert model.config.family == family
    assert_logits_close(forward(model, jnp.asarray(TOKENS)), hf_logits(reference))
    real = np.ones(TOKENS.shape, bool)
    real[0, :4] = False
    mask = torch.tensor(real.astype(np.int64))
    places = (mask.cumsum(1) - 1).clamp(min=0)
    prompt = torch.tensor(TOKENS, dtype=torch.long)
    with torch.no_grad():
        padded = reference(prompt, attention_mask=mask, position_ids=places).logits.numpy()
    ours = np.asarray(forward(model, jnp.asarray(TOKENS), padding_mask=real))
    assert_logits_close(ours[real], padded[real])
    # With a cache, greedy, beyond the window.
    settings = {"do_sample": False, "max_new_tokens": 6, "eos_token_id": []}
    wanted = reference.generate(prompt[1:], attention_mask=mask[1:], **settings)
    [found] = generate_tokens(model, [TOKENS[1].tolist()], max_new_tokens=6, stop_token_ids=())
    assert list(found) == wanted[0, TOKENS.shape[1] :].tolist()


@pytest.mark.parametrize(
    ("family", "method"),
    always(
        [(family, method) for family in NEW for method in METHODS],
        lambda case: case == ("qwen3", "zflora-uniform"),
    ),
)
def test_every_method_on_every_family(family: str, method: str, tokens: Any) -> None:
    """Adapted, fused, packed, swapped; the base comes back."""
    model, adapter = tiny_family(family), AdapterConfig(method, rank=4)
    adapters = perturbed_adapters(model, adapter, std=0.1)
    adapted = np.asarray(forward(model, tokens, adapter, adapters))
    fused = fuse(model, adapter, adapters)
    packed = pack_for_decode(fused, "tpu")
    assert_logits_close(forward(fused, tokens), adapted)
    assert_logits_close(forward(packed, tokens), adapted)
    if METHODS[method].widens:
        assert_trees_equal(unfuse(fused)[0].params, model.params)
        other = jax.tree.map(lambda x: 0.5 * x, adapters)
        wanted = forward(model, tokens, adapter, other)
        assert_logits_close(forward(swap(packed, other), tokens), wanted)


@pytest.mark.parametrize("family", always(NEW, lambda name: name == "smollm3"))
def test_a_training_step_of_every_family(family: str, tokens: Any) -> None:
    """Adapter gradients are the same with scanned and separate layers and by every policy of remat,
    and no leaf of them is zero.
    """
    model, adapter = tiny_family(family), AdapterConfig("zflora-uniform", rank=4)
    adapters = perturbed_adapters(model, adapter, std=0.1)
    half, layers = tokens.shape[1] // 2, model.config.num_layers
    tokens = tokens[:, : 2 * half]
    segments = jnp.broadcast_to(jnp.repeat(jnp.asarray([1, 2]), half), tokens.shape)

    def gradients(config: LlamaConfig, params: Any, adapters: Any) -> Any:
        def loss(adapters: Any) -> Any:
            variables = {"params": params, "adapters": adapters}
            logits = Llama(config, adapter).apply(variables, tokens, segment_ids=segments)
            return jnp.mean(jnp.square(logits))  # type: ignore[arg-type]

        return jax.device_get(jax.jit(jax.grad(loss))(adapters))

    kept, dots = (
        trees.flatten(gradients(model.config.replace(remat=policy), model.params, adapters))
        for policy in ("none", "dots")
    )
    apart = (trees.unstack_layers(tree, layers) for tree in (model.params, adapters))
    separate = gradients(model.config.replace(remat="block", scan_layers=False), *apart)
    again = trees.flatten(trees.stack_layers(separate, layers))
    for name, leaf in kept.items():
        scale = float(np.abs(leaf).max())
        assert scale > 0, name
        for other in (dots, again):
            np.testing.assert_allclose(other[name], leaf, rtol=0, atol=1e-5 * scale, err_msg=name)


def test_prompts_of_several_lengths_with_a_window() -> None:
    """Padding takes no place in it."""
    model = tiny_model(family="mistral", sliding_window=12, num_layers=1)
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, 250, n).tolist() for n in (20, 31, 18)]
    together = generate_tokens(model, prompts, max_new_tokens=9, stop_token_ids=())
    for prompt, found in zip(prompts, together, strict=True):
        [alone] = generate_tokens(model, [prompt], max_new_tokens=9, stop_token_ids=())
        assert list(found) == list(alone)


@pytest.mark.parametrize("eps_z", [0.5, None])
def test_the_reported_cost_of_normed_heads_is_the_real_one(eps_z, tokens, tmp_path) -> None:
    model, adapter = tiny_family("qwen3"), AdapterConfig("ffba", rank=4)
    fused = fuse(model, adapter, perturbed_adapters(model, adapter, std=0.1))
    save_hf(tmp_path / "x", fused, eps_z=eps_z)
    ours = np.asarray(forward(load_stock(tmp_path / "x"), tokens))
    theirs = hf_logits(open_stock(tmp_path / "x"), np.asarray(tokens))
    assert_logits_close(ours, theirs, share=2e-5)  # all but rms_norm_eps
    far = np.abs(theirs - np.asarray(forward(fused, tokens))).max() / np.abs(theirs).max()
    assert far > 0.01 if eps_z else far < 1e-4


# --- config.json ----------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_defaults_of_a_config_are_those_of_transformers(family: str) -> None:
    theirs = transformers.AutoConfig.for_model(family)
    needed = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
    sizes = {key: getattr(theirs, key) for key in (*needed, "num_attention_heads")}
    ours = from_hf_config({"model_type": family, **sizes})
    head_dim = getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads
    eos = theirs.eos_token_id
    assert (ours.num_kv_heads, ours.head_dim) == (theirs.num_key_value_heads, head_dim)
    assert ours.rope_theta == theirs.rope_parameters["rope_theta"]
    assert ours.rms_norm_eps == theirs.rms_norm_eps
    assert ours.max_position_embeddings == theirs.max_position_embeddings
    assert ours.tie_word_embeddings == theirs.tie_word_embeddings
    assert ours.sliding_window == getattr(theirs, "sliding_window", None)
    nope = getattr(theirs, "no_rope_layers", [1] * theirs.num_hidden_layers)
    assert ours.nope_layers == tuple(i for i, rotated in enumerate(nope) if not rotated)
    assert (ours.bos_token_id, ours.pad_token_id) == (theirs.bos_token_id, theirs.pad_token_id)
    assert ours.eos_token_ids == (() if eos is None else (eos,))


@pytest.mark.parametrize("name", PRESETS)
def test_a_config_is_read_as_it_was_written(name: str) -> None:
    written = json.loads(json.dumps(to_hf_config(preset(name), "float32")))
    assert from_hf_config(written) == preset(name)


def test_a_window_that_no_layer_has_is_none_and_one_without_length_is_that_of_transformers() -> (
    None
):
    plain = to_hf_config(preset("qwen2.5-0.5b"), "float32") | WINDOW
    plain.pop("layer_types")
    assert from_hf_config(plain).sliding_window == 5
    assert from_hf_config(plain | {"max_window_layers": 24}).sliding_window is None
    assert from_hf_config(plain | {"use_sliding_window": False}).sliding_window is None
    for family in ("qwen2", "qwen3"):
        used = {"use_sliding_window": True, "max_window_layers": 0}
        stock = transformers.AutoConfig.for_model(family, **used)
        config = stock.to_dict()
        del config["sliding_window"], config["layer_types"]
        assert from_hf_config(config).sliding_window == stock.sliding_window == 4096
    mistral = to_hf_config(preset("mistral-7b-v0.1"), "float32") | {"sliding_window": 5}
    assert from_hf_config(mistral | {"use_sliding_window": False}).sliding_window == 5


@pytest.mark.parametrize(
    ("family", "settings", "words"),
    [
        ("gemma3", {}, r"model_type='gemma3' is not supported; only 'llama' or 'mistr"),
        ("qwen3", {"attention_bias": True}, "attention_bias=True"),
        ("qwen3", WINDOW | {"max_window_layers": 1}, "in some layers only is not supported"),
        ("qwen3", WINDOW | {"layer_types": ["sliding_attention", "full_attention"]}, "some layers"),
        ("smollm3", WINDOW, "sliding_window=5 is not supported for smollm3"),
        ("smollm3", {"no_rope_layers": [1]}, "for each of the 2 layers"),
        ("smollm3", {"no_rope_layer_interval": 0}, "no_rope_layers=None"),
        ("llama", {"sliding_window": 5}, "sliding_window=5 is not supported"),
        ("qwen2", {"partial_rotary_factor": 0.75}, r"partial_rotary_factor=0.75.*only 1"),
        ("llama", {"rope_scaling": {"type": "longrope"}}, "rope_type 'longrope' is not supported"),
        ("llama", {"auto_map": {"AutoModelForCausalLM": "x.OtherForCausalLM"}}, "auto_map.*Other"),
    ],
)
def test_unsupported_settings_are_refused(family, settings, words) -> None:
    sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads")
    plain = {"model_type": family, "num_hidden_layers": 2, **dict.fromkeys(sizes, 64)}
    with pytest.raises(ConfigError, match=words):
        from_hf_config(plain | settings)


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("qwen3", {"head_dim": 20}),
        ("smollm3", {"num_hidden_layers": 4, "no_rope_layers": [1, 1, 1, 0]}),
    ],
)
def test_gguf_files_of_other_families(family, settings, tmp_path: Path) -> None:
    reference = hf_model(family=family, **settings)
    write_gguf(tmp_path / "x.gguf", reference)
    model = load_model(tmp_path / "x.gguf")
    assert model.config.family == family
    assert_logits_close(forward(model, jnp.asarray(TOKENS)), hf_logits(reference))
