"""Exports: dtypes, shards and refusals; directories replaced with care, companion files, files that
do not match; eps_z, which stock form needs because a joint norm sees the state.
"""

import contextlib
import json
import os
import shutil
import stat
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file
from support.byte_tokenizer import byte_tokenizer
from support.checks import assert_logits_close, assert_trees_equal
from support.exports import WIDENED, fused_model, perturbed_adapters
from support.huggingface import TOKENS, hf_logits, open_stock
from support.models import tiny_model

from zflora_jax import Model, export_gap, forward, fuse, load_model, save_hf, save_peft, unfuse
from zflora_jax.adapters.packing import pack_for_decode
from zflora_jax.config import AdapterConfig, RopeScaling
from zflora_jax.core import trees
from zflora_jax.core.errors import CheckpointError
from zflora_jax.core.fields import ConfigError
from zflora_jax.hf.config import to_hf_config
from zflora_jax.hf.load import model_config
from zflora_jax.hf.restore import SIDE_FILE, load_stock, longrope
from zflora_jax.hf.save import misread, model_card
from zflora_jax.hf.stock import CHOICES, FLOAT16_LEAST, StockForm, choose_eps_z, state_share
from zflora_jax.hf.tokenizer import GENERATION, TEMPLATES, TOKENIZER_FILES
from zflora_jax.ops.rope import rope_frequencies

LORA, MINIMAL = AdapterConfig("lora", rank=2), AdapterConfig("zflora-minimal", rank=8)
WRONG_SCALES = [float("nan"), float("inf"), 1e-320, -1, 0, 0.3, "x", None]
REVISION = "0123456789abcdef" * 2 + "01234567"  # as the hub's cache names its snapshots
# Widths that no server has kernels for are fine here.
pytestmark = pytest.mark.filterwarnings("ignore:head_dim")


def logits(model: Model) -> np.ndarray:
    return np.asarray(forward(model, jnp.asarray(TOKENS)), np.float64)


def manifest(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "zflora.json").read_text())


def test_separate_layers_and_shards(bases: dict[str, Model], tmp_path: Path) -> None:
    """Of a tied model with Llama-3's RoPE scaling, which the export keeps."""
    base = load_model(str(bases["llama3"].source), scan_layers=False)
    fused = fused_model(base, WIDENED["zflora-uniform"])
    report = save_hf(tmp_path / "out", fused, max_shard_bytes=60_000)
    files = {str(p.relative_to(tmp_path / "out")) for p in (tmp_path / "out").rglob("*.*")}
    assert set(report["files"]) == files and "MLP 86" in report["widths"]
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_parameters"] == report["parameters"]
    shards = [tmp_path / "out" / file for file in set(index["weight_map"].values())]
    assert len(shards) > 2 and all(file.stat().st_size < 70_000 for file in shards)
    assert_logits_close(hf_logits(open_stock(tmp_path / "out")), logits(fused))
    assert_trees_equal(load_model(tmp_path / "out", scan_layers=False).params, fused.params)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision(dtype: str, bases: dict[str, Model], tmp_path: Path) -> None:
    fused = fused_model(bases["plain"], WIDENED["zflora-uniform"])
    save_hf(tmp_path / "out", fused, dtype=dtype)
    eps_z = manifest(tmp_path / "out")["eps_z"]
    assert eps_z == choose_eps_z(fused, dtype) >= FLOAT16_LEAST
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == dtype
    half = load_model(tmp_path / "out", "bfloat16")
    assert save_hf(tmp_path / "half", half)["dtype"] == "bfloat16"  # its own
    again = load_model(tmp_path / "out")
    flat = trees.flatten(again.params)
    for name, leaf in trees.flatten(fused.params).items():
        # Rounded to the stored dtype once; float16's subnormals cost the state a bit.
        rounded = np.asarray(leaf).astype(jnp.dtype(dtype)).astype(np.float32)
        atol = 2**-20 if dtype == "float16" else 0
        np.testing.assert_allclose(flat[name], rounded, rtol=0, atol=atol, err_msg=name)
    round_trip = lambda _, leaf: leaf.astype(dtype).astype(jnp.float32)  # noqa: E731
    wanted = trees.map_with_names(round_trip, bases["plain"].params)
    assert_trees_equal(unfuse(again)[0].params, wanted)
    share = 0.1 if dtype == "bfloat16" else 0.02
    assert_logits_close(hf_logits(open_stock(tmp_path / "out")), logits(fused), share)
    with jax.numpy_dtype_promotion("standard"):  # jax's own bfloat16 attention needs it
        gap = export_gap(fused, tmp_path / "out", TOKENS[:1])
    assert 0 < gap["max_abs_dlogit"] < 0.2 * gap["logit_scale"]


@pytest.mark.parametrize(
    ("kernel", "value", "dtype", "words"),
    [
        # Fits float16, but not once divided by eps_z = 2^-4.
        ("attn/q", 5000.0, "float16", r"1\.self_attn\.q_proj.*range of float16"),
        ("mlp/up", np.nan, None, r"layers\.1\.mlp\.up_proj\.weight holds NaN"),
        ("mlp/up", 1.0, "int8", "int8"),
        ("mlp/up", 1.0, "packed", "packed"),
    ],
)
def test_refusals_leave_nothing_behind(
    kernel: str, value: float, dtype: Any, words: str, bases: dict[str, Model], tmp_path: Path
) -> None:
    fused = fused_model(bases["plain"], WIDENED["zflora-minimal"])
    block, name = kernel.split("/")
    leaf = fused.params["layers"][block][name]
    leaf["kernel"] = leaf["kernel"].at[1, 50].set(value)
    if dtype == "packed":
        fused, dtype = pack_for_decode(fused), None
    with pytest.raises((ConfigError, CheckpointError), match=words):
        save_hf(tmp_path / "out", fused, dtype=dtype)
    assert list(tmp_path.iterdir()) == []


# --- the directory ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def fused(bases: dict[str, Model]) -> Model:
    return fused_model(bases["plain"], WIDENED["zflora-uniform"])


@pytest.fixture(scope="module")
def exported(fused: Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("exported") / "out"
    save_hf(path, fused)
    return path


@pytest.fixture
def out(exported: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(exported, tmp_path / "out"))


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_only_our_own_exports_are_replaced(
    bases: dict[str, Model], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, out = bases["plain"], tmp_path / "out"
    out.mkdir()
    save_hf(out, model)  # an empty directory is no loss
    ours, theirs = (load_file(f"{path}/model.safetensors") for path in (out, model.source))
    assert ours.keys() == theirs.keys() and all(np.array_equal(ours[k], theirs[k]) for k in ours)
    first = (out / "model.safetensors").stat()
    save_hf(out, model)
    second, config = ((out / n).stat() for n in ("model.safetensors", "config.json"))
    assert second.st_ino != first.st_ino and names(tmp_path) == {"out"}
    assert stat.S_IMODE(second.st_mode) == stat.S_IMODE(config.st_mode)

    (out / "notes.txt").write_text("mine")
    card = (out / "README.md").read_text()
    (out / "README.md").write_text("my words")
    with pytest.raises(CheckpointError, match=r"there, or that were edited: README.md, notes\.txt"):
        save_hf(out, model)
    assert (out / "notes.txt").read_text() == "mine"
    (out / "README.md").write_text(card)
    (out / "notes.txt").unlink()
    late = lambda *_: (out / "late").touch()  # noqa: E731
    monkeypatch.setattr("zflora_jax.hf.save.write_tokenizer_files", late)
    with pytest.raises(CheckpointError, match="edited: late"):
        save_hf(out, model)  # the file came while it was written
    (out / "late").unlink()
    other = {"format": "something else", "files": [*names(out)]}
    (out / "zflora.json").write_text(json.dumps(other))
    foreign = shutil.copytree(str(model.source), tmp_path / "foreign")
    for folder in (out, foreign):
        with pytest.raises(CheckpointError, match="not written by this project"):
            save_hf(folder, model)
    assert names(foreign) == names(Path(str(model.source)))

    def endless(folder: Path, _: str) -> Iterator[Path]:  # as "/" is
        yield from (folder / str(i) for i in range(9))
        raise AssertionError("all of it was listed")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rglob", endless)
        with pytest.raises(CheckpointError, match="not written by this project"):
            save_hf(foreign, model)
    with pytest.raises(CheckpointError, match="is a file"):
        save_hf(foreign / "config.json", model)
    assert names(tmp_path) == {"out", "foreign"}


@pytest.mark.parametrize("moment", ["write", "first rename", "second rename"])
def test_a_failed_replacement_keeps_the_old_export(
    moment: str, bases: dict[str, Model], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, calls, rename = tmp_path / "out", [], os.rename
    save_hf(out, bases["plain"])
    before = {p.name: p.read_bytes() for p in out.iterdir() if p.is_file()}

    def failing(*paths: Any, **_: Any) -> None:
        calls.append(paths)
        if len(calls) == (2 if moment == "second rename" else 1):
            raise OSError(28, "No space left on device")
        rename(*paths)

    place = "zflora_jax.hf.save.write_tensors" if moment == "write" else "os.rename"
    monkeypatch.setattr(place, failing)
    with pytest.raises(CheckpointError, match="No space left"):
        save_hf(out, bases["llama3"])
    assert {p.name: p.read_bytes() for p in out.iterdir() if p.is_file()} == before
    assert names(tmp_path) == {"out"}


def test_tokenizer_and_generation_config(bases: dict[str, Model], tmp_path: Path) -> None:
    """Byte for byte from the base's directory; from the tokenizer object where there is no
    directory; the same ids either way.
    """
    source, tokenizer = tmp_path / "base", byte_tokenizer()
    shutil.copytree(str(bases["plain"].source), source)
    tokenizer.save_pretrained(source)
    (source / "generation_config.json").write_text('{"eos_token_id": [2, 3],   "do_sample": true}')
    model = load_model(source)
    assert model.config.eos_token_ids == (2, 3)
    save_hf(tmp_path / "out", model)
    copied = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")
    for name in (*copied, "chat_template.jinja"):
        assert (tmp_path / "out" / name).read_bytes() == (source / name).read_bytes()
    assert load_model(tmp_path / "out").config == model.config
    (source / "generation_config.json").write_text('{"do_sample":   true}')  # config.json has it
    save_hf(tmp_path / "silent", load_model(source))
    assert (tmp_path / "silent" / "generation_config.json").read_text() == '{"do_sample":   true}'

    tokenizer(["a", "bb"], padding=True, truncation=True, max_length=1)  # which is not to be saved
    save_hf(tmp_path / "written", Model(model.config, model.params, tokenizer))
    found = json.loads((tmp_path / "written" / "tokenizer.json").read_text())
    assert found["padding"] is found["truncation"] is None
    settings = json.loads((tmp_path / "written" / "tokenizer_config.json").read_text())
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"
    generation = json.loads((tmp_path / "written" / "generation_config.json").read_text())
    assert generation == {"bos_token_id": 1, "eos_token_id": [2, 3], "pad_token_id": 0}
    chat, text = [{"role": "user", "content": "1 + 1?"}], "héllo  12 <eos>\n"
    for path in ("out", "written"):
        again = transformers.AutoTokenizer.from_pretrained(tmp_path / path)
        assert again(text)["input_ids"] == byte_tokenizer()(text)["input_ids"]
        assert again.eos_token_id == tokenizer.eos_token_id
        assert again.pad_token_id == tokenizer.pad_token_id
        prompts = [t.apply_chat_template(chat, tokenize=False) for t in (again, tokenizer)]
        assert prompts[0] == prompts[1]


@pytest.mark.parametrize(
    ("file", "change", "words"),
    [
        ("config.json", {"rms_norm_eps": 1e-5}, "rms_norm_eps"),
        ("config.json", {"hidden_size": 48}, "hidden_size"),
        ("config.json", {"rope_scaling": None}, "rope_scaling"),
        ("config.json", {"rope_theta": 1e4}, "rope_theta"),
        ("config.json", {"attention_bias": True}, "attention_bias"),
        ("zflora.json", {"version": 2}, r"version are .*, 2\)"),
        ("zflora.json", {"format": "x"}, "not a manifest"),
        ("zflora.json", {"adapter": {"method": "zflora-uniform", "rank": 9}}, "was not fused from"),
        ("zflora.json", {"native_config": {}}, "incomplete or damaged"),
        ("zflora.json", {"base": {}}, "damaged: base is incomplete or damaged: name, hidden_size"),
        ("zflora.json", {"base": None}, "damaged: base=None"),
        ("zflora.json", {"padding": 3}, "padding=3 contradicts native_config: expected 0"),
        ("zflora.json", {"multiple": 0}, "multiple=0: must be at least 1"),
        ("zflora.json", {"figures": [1]}, "figures"),
        ("zflora.json", {"state_share": "x"}, "state_share='x': expected float"),
        *(("zflora.json", {"eps_z": eps}, "eps_z=.*(power|expected)") for eps in WRONG_SCALES),
        ("zflora.json", {"eps_z": 2.0**-7}, "do not belong together: read with its eps_z = 0.0078"),
    ],
)
def test_files_that_do_not_belong_together(
    file: str, change: dict[str, Any], words: str, out: Path
) -> None:
    values = json.loads((out / file).read_text())
    assert file != "zflora.json" or values["eps_z"] == 2.0**-9
    (out / file).write_text(json.dumps(values | change))
    with pytest.raises(ValueError, match=words):
        load_model(out)


def test_a_missing_side_file_and_a_state_in_the_embedding_are_refused(
    fused: Model, out: Path
) -> None:
    """The state starts at zero: other software put a value there, and it would be dropped."""
    (out / SIDE_FILE).rename(out / "elsewhere")
    with pytest.raises(CheckpointError, match=r"lacks zflora/restore\.safetensors: copy it"):
        load_model(out)
    (out / "elsewhere").rename(out / SIDE_FILE)
    tensors, name = load_file(out / "model.safetensors"), "model.embed_tokens.weight"
    tensors[name][3, fused.config.base_width] = 0.5
    save_file(tensors, out / "model.safetensors")
    with pytest.raises(CheckpointError, match=rf"{name} has channels from .* that are not zero"):
        load_model(out)


@pytest.mark.parametrize("sub", ["", "sub"])
def test_an_export_on_the_hub_is_the_export_on_disk(
    sub: str, fused: Model, exported: Path, tmp_path: Path
) -> None:
    """In the hub's cache each file is a link into the blobs, also below a folder."""
    home = tmp_path / "models--org--name"
    (home / "blobs").mkdir(parents=True)
    there = home / "snapshots" / REVISION / sub
    for i, file in enumerate(path for path in exported.rglob("*") if path.is_file()):
        link = there / file.relative_to(exported)
        link.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, home / "blobs" / str(i))
        link.symlink_to(os.path.relpath(home / "blobs" / str(i), link.parent))
    loaded = load_model(there)
    assert_trees_equal(loaded.params, fused.params)
    assert model_config(there) == loaded.config  # of the model, not of its stock form


COMPANIONS = (*TOKENIZER_FILES, GENERATION, "config.json", f"{TEMPLATES}/a.jinja", TEMPLATES)


@pytest.mark.parametrize(
    ("place", "link"),
    [
        *(("model", "refs"), ("model", "between")),
        *(("snapshots/model", link) for link in ("refs", "blobs")),
        *((f"snapshots/{REVISION}", link) for link in ("refs", "blobs")),
    ],
)
def test_links_to_other_places_are_neither_read_nor_copied(
    place: str, link: str, bases: dict[str, Model], tmp_path: Path
) -> None:
    """A link may name a private key, directly, by a second link, or below a folder "snapshots"."""
    base, home, model = bases["plain"], tmp_path / "x", tmp_path / "x" / place
    (home / "refs").mkdir(parents=True)
    (home / "refs" / "a.jinja").write_text('{"model_type": "llama", "secret": 1}')
    if link == "blobs" and REVISION not in place:
        shutil.copytree(home / "refs", home / link)
    elif link != "refs":
        (home / link).symlink_to(home / "refs")
    for name in COMPANIONS:
        shutil.copytree(str(base.source), model)
        (model / "added_tokens.json").write_text("{}")  # enough for templates to be copied
        (model / name).unlink(missing_ok=True)
        (model / name).parent.mkdir(exist_ok=True)
        (model / name).symlink_to(home / link / ("" if name == TEMPLATES else "a.jinja"))
        with pytest.raises(CheckpointError, match="is a link that leads out of"):
            load_model(model)
        with contextlib.suppress(CheckpointError):  # where it would be copied
            save_hf(tmp_path / "out", replace(base, source=str(model)))
        exported = (file for file in tmp_path.glob("out/**/*") if file.is_file())
        assert all(b"secret" not in file.read_bytes() for file in exported), name
        shutil.rmtree(model)
    shutil.copytree(str(base.source), model)
    named = {"tokenizer_class": "BertTokenizer", "vocab_file": str(home / "refs" / "a.jinja")}
    (model / "tokenizer_config.json").write_text(json.dumps(named))
    with pytest.raises(CheckpointError, match=r"vocab_file='.*a\.jinja' is outside of"):
        load_model(model)
    shutil.copy(model / "tokenizer_config.json", model / "a.jinja")  # a decoy of that name
    (model / "tokenizer_config.json").write_text('{"vocab_file": "a.jinja"}')
    with contextlib.chdir(home / "refs"), pytest.raises(CheckpointError, match="is outside of"):
        load_model(model)


def test_the_base_of_an_export_is_not_called_as_the_export(exported: Path, tmp_path: Path) -> None:
    """Adapters on it belong to the base; saved again, the export has the same base."""
    fused = load_model(exported)
    assert (fused.source, fused.base) == (str(exported), "plain")
    base, adapters = unfuse(fused)
    assert (base.source, base.base) == (fused.source, "plain")  # its other files are there still
    assert unfuse(fuse(base, fused.adapter, adapters))[0].base == "plain"
    save_peft(tmp_path / "peft", base, LORA, perturbed_adapters(base, LORA))
    written = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert written["base_model_name_or_path"] == "plain"
    save_hf(tmp_path / "again", fused)
    assert manifest(tmp_path / "again")["base"]["name"] == "plain"


@pytest.mark.parametrize("name", ["plain", "llama3"])
def test_two_spellings_of_rope_and_none_of_zflora(
    name: str, bases: dict[str, Model], tmp_path: Path
) -> None:
    """Also at positions far apart. Without zflora.json it is an ordinary model, as it was."""
    fused, out = fused_model(bases[name], WIDENED["zflora-uniform"]), tmp_path / "out"
    plain, report = save_hf(out, bases["plain"]), save_hf(out, fused)
    assert "misread by" not in plain and "MaxText" in report["misread by"]
    assert ("sglang-jax (ignores" in report["misread by"]) == (name == "llama3")
    qwen2 = [replace(x, config=x.config.replace(family="qwen2")) for x in (bases["plain"], fused)]
    assert ["overrides" in str(misread(x)) for x in (*qwen2, fused)] == [False, True, False]
    assert "vLLM (`vllm serve --hf-overrides '{" in model_card(qwen2[1], report, {})
    positions = torch.arange(TOKENS.shape[1])[None].repeat(len(TOKENS), 1)
    positions[:, 4:] += 1000  # the rounding of float32 angles grows with it

    def far() -> np.ndarray:
        with torch.no_grad():
            return open_stock(out)(torch.tensor(TOKENS), position_ids=positions).logits.numpy()

    written, first = far(), (out / "config.json").read_text()
    assert '"rope_type": "llama3"' in first and json.loads(first)["rope_theta"] > 500
    stored = {key: x for key, x in manifest(out).items() if key not in ("state_share", "digests")}
    (out / "zflora.json").write_text(json.dumps(stored))
    last_bit = {"rope_theta": float(np.nextafter(json.loads(first)["rope_theta"], 0))}
    (out / "config.json").write_text(json.dumps(json.loads(first) | last_bit))
    load_model(out)  # of a machine with another pow, without the state's share
    save_hf(out, fused)  # and such an export is this project's own
    form = StockForm(fused.config, manifest(out)["eps_z"])
    (out / "config.json").write_text(json.dumps(json.loads(first) | longrope(form)))
    assert_logits_close(far(), written, 5e-4)
    assert_trees_equal(load_model(out).params, fused.params)
    (out / "zflora.json").unlink()
    with pytest.raises(ConfigError, match=r"longrope.*copy zflora\.json"):
        load_model(out)
    (out / "config.json").write_text(first)
    ordinary = load_model(out)
    assert ordinary.adapter is None
    assert_logits_close(logits(ordinary), logits(fused))


@pytest.mark.parametrize("theta", [1e4, 5e5, 5e6])
@pytest.mark.parametrize(("k", "w"), [(64, 80), (128, 160), (96, 112)])
@pytest.mark.parametrize("scaling", [None, RopeScaling(8.0, 1.0, 4.0, 8192)])
def test_frequencies_of_widened_heads(
    theta: float, k: int, w: int, scaling: RopeScaling | None
) -> None:
    """The base's; the adapter's pairs stand still at 131,072 positions, or nearly."""
    native = tiny_model().config.replace(head_dim=w, base_head_dim=k, rope_theta=theta)
    native = native.replace(rope_scaling=scaling, max_position_embeddings=131_072)
    written = to_hf_config(StockForm(native, 1.0).hf_config, "float32")
    found = transformers.AutoConfig.for_model(**written)
    init = transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS["llama3"]
    frequencies = init(found, "cpu")[0].numpy()
    np.testing.assert_allclose(frequencies[: k // 2], rope_frequencies(native), rtol=2e-6)
    angle = 131_072 / theta / (scaling.factor if scaling else 1e10)
    assert frequencies[k // 2 :].max() * 131_072 <= 1.001 * angle


def test_an_export_that_turns_its_adapter_warns(tmp_path: Path) -> None:
    changes = {"rope_scaling": RopeScaling(8.0, 1.0, 4.0, 64), "rope_theta": 100.0}
    base = tiny_model(**changes, max_position_embeddings=256)
    with pytest.warns(UserWarning, match=r"dims of heads rotate by up to 0\.32 rad"):
        save_hf(tmp_path / "out", fused_model(base, WIDENED["ffba"]))


# --- the scale of the state --------------------------------------------------------------------


def trained_like(seed: int = 0, std: float = 0.02, **changes: object) -> Model:
    """Adapters near their initialisation, as training leaves them."""
    model = tiny_model(seed, num_layers=3, **changes)
    return fuse(model, MINIMAL, perturbed_adapters(model, MINIMAL, std))


def test_the_choice_follows_the_weights() -> None:
    fused = trained_like()
    share, d = state_share(fused), fused.config.base_width
    assert choose_eps_z(fused, "bfloat16") >= 16 * choose_eps_z(fused, "float32")

    def scaled(factor: float) -> Model:
        """The state times `factor`: as a larger adapter would write it."""

        def visit(name: str, x: jax.Array) -> jax.Array:
            written = name.endswith(("o/kernel", "down/kernel"))
            return x.at[..., d:].multiply(factor) if written else x

        return Model(fused.config, trees.map_with_names(visit, fused.params), adapter=MINIMAL)

    assert state_share(scaled(0.25)) == pytest.approx(share / 16, rel=1e-6)
    for dtype in ("float32", "bfloat16"):
        assert choose_eps_z(scaled(0.25), dtype) == 4 * choose_eps_z(fused, dtype)
    assert choose_eps_z(scaled(0.0), "float32") == 1.0
    assert choose_eps_z(scaled(1e6), "float32") == CHOICES[-1] == 2.0**-10
    assert choose_eps_z(scaled(1e6), "float16") == 2.0**-4  # float16 cannot hold less
    flat = Model(fused.config.replace(scan_layers=False), trees.unstack_layers(fused.params, 3))
    assert state_share(flat) == pytest.approx(share, rel=1e-6)
    assert state_share(tiny_model()) == 0.0 and choose_eps_z(tiny_model(), "float32") == 1.0


@pytest.mark.parametrize("seed", [0, 1])
def test_the_estimate_bounds_the_share_of_every_token(seed: int, tmp_path: Path) -> None:
    """The safety factor covers the excess of single tokens over the estimate from the weights."""
    fused = trained_like(seed, tie_word_embeddings=False)
    want, gained = logits(fused), {}
    for eps in (0.5, 0.25):  # large enough to be seen above the rounding of float32
        save_hf(tmp_path / "out", fused, eps_z=eps)
        wrong = np.abs(logits(load_stock(tmp_path / "out")) - want)
        gained[eps] = wrong.max() / np.abs(want).max()
        assert gained[eps] <= 4 * state_share(fused) * eps**2 / 2
    assert gained[0.5] / gained[0.25] == pytest.approx(4, rel=0.3)  # the square of eps_z


def test_other_scales_are_refused_and_a_model_without_a_state_has_none(tmp_path: Path) -> None:
    fused = trained_like()
    for eps in (0.1, 2.0, 2.0**-11, 0.0, -0.5, float("nan")):
        with pytest.raises(ConfigError, match=r"power of two from 2\^-10.*int8"):
            save_hf(tmp_path / "out", fused, eps_z=eps)
    with pytest.raises(ConfigError, match="this model has none"):
        save_hf(tmp_path / "out", tiny_model(), eps_z=0.0625)
    assert list(tmp_path.iterdir()) == []
    report = save_hf(tmp_path / "out", tiny_model())
    assert "eps_z" not in report and manifest(tmp_path / "out")["eps_z"] == 1
