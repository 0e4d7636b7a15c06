"""Checks that vLLM, transformers and llama.cpp (GGUF files in f32) compute the same from an export
as this project.

Command: tools/check_consumers.sh, which makes the environments. Exports bases and their fusions
with perturbed adapters, in float32 and bfloat16: of SmolLM2-135M, and of 6 layers of the sizes of
Qwen2.5-0.5B and Qwen3-0.6B with random weights and SmolLM2's tokens.
Every consumer generates greedily from the same token ids: three prompts and the first pieces of
docs/method.md, whose log-likelihoods transformers and vLLM give, too. Writes
results/consumers.json and .md; `--bases`, `--methods` and `--consumers` renew some figures and keep
the others. A row reports an export that a consumer refuses or computes differently.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import consumer_workers
from consumer_workers import NEW_TOKENS

RANK, STD = 16, 0.01
PROMPTS = [
    "The three states of matter are",
    "Q: A farmer has 12 cows and buys 30 more. How many cows are there now?\nA:",
    "Once upon a time, in a village by the sea, there lived",
]
BASES = ("smollm2-135m", "qwen2.5-0.5b", "qwen3-0.6b")
SERVERS = {"transformers": "transformers", "vllm": "vLLM"}
CONSUMERS = {"llama.cpp": "llama.cpp"}  # of SmolLM2 in float32 alone
DTYPES = ("float32", "bfloat16")
LAYERS, CHUNKS, CHUNK = 6, 3, 256
WIDTHS = ("hidden_size", "head_dim", "intermediate_size")


def ask(python: str, worker: str, job: dict[str, Any]) -> Any:
    """Returns the answer of a key of `consumer_workers.WORKERS` to a job, in the environment of the
    interpreter `python`; or {"error": the last line of its output}.
    """
    # Waiting passively is 10 times faster than spinning on shared cores.
    env = os.environ | {"PYTHONPATH": "", "OMP_WAIT_POLICY": "passive"}
    env |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
    env |= {"VLLM_NO_USAGE_STATS": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    env |= {"VLLM_LOGGING_LEVEL": "ERROR"}
    command = [python, consumer_workers.__file__, worker, json.dumps(job)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=3600)
    except subprocess.TimeoutExpired:
        return {"error": "no answer within an hour"}
    if done.returncode:
        return {"error": last_words(done.stderr)}
    return json.loads(done.stdout.splitlines()[-1])


def last_words(stderr: str) -> str:
    """The last line with an error, or else the last line."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    errors = [line for line in lines if "Error" in line or "error" in line]
    from zflora_jax.reporting.provenance import relative_paths

    return relative_paths((errors or lines or ["no message"])[-1][:200])


def small_model() -> Any:
    """A small Llama with random weights, whose likeliest token is a clear one."""
    import jax

    from zflora_jax.core.presets import preset
    from zflora_jax.nn.llama import random_model

    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_heads": 4, "num_kv_heads": 2}
    sizes |= {"head_dim": 64, "vocab_size": 512, "max_position_embeddings": 512}
    config = preset("tiny").replace(**sizes, tie_word_embeddings=False)
    model = random_model(config, jax.random.key(0))
    # So large that attention is far from uniform.
    model.params = jax.tree.map(lambda x: 3.0 * x if x.ndim > 2 else x, model.params)
    return model


def real_size(name: str, tokenizer: Any) -> Any:
    """LAYERS layers of a preset's size with random weights, with clear likeliest tokens."""
    import jax.numpy as jnp
    import numpy as np

    from zflora_jax.core import trees
    from zflora_jax.core.architecture import QK_NORMS, param_shapes
    from zflora_jax.core.model import Model
    from zflora_jax.core.presets import preset

    names = ("vocab_size", "bos_token_id", "eos_token_ids", "pad_token_id")
    smollm2 = {name: getattr(preset("smollm2-135m"), name) for name in names}
    config = preset(name).replace(num_layers=LAYERS, **smollm2)
    draw = np.random.default_rng(0).standard_normal

    def leaf(name: str, shape: tuple[int, ...]) -> Any:
        x, (module, parameter) = draw(shape, np.float32), name.split("/")[-2:]
        gain = 1.5 if module in ("q", "k", *QK_NORMS) else 1.0  # scores far from uniform
        if parameter == "kernel":
            return gain * x / np.sqrt(shape[1] * shape[2] if module == "o" else shape[1])
        if parameter == "bias":  # a few are large
            return 0.5 * x * np.exp(draw(shape, np.float32))
        return gain * (1 + 0.3 * x) if parameter == "scale" else 0.12 * x

    shapes = param_shapes(config).items()
    leaves = {name: jnp.asarray(leaf(name, shape), jnp.float32) for name, shape in shapes}
    return Model(config, trees.unflatten(leaves), tokenizer)


def fused(base: Any, method: str, rank: int, std: float) -> Any:
    """Returns `base`, or `base` fused with adapters perturbed by normal noise of `std`."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from zflora_jax import AdapterConfig, fuse, init_adapters
    from zflora_jax.core import trees

    if method == "base":
        return base
    adapter, rng = AdapterConfig(method, rank=rank), np.random.default_rng(0)
    adapters = init_adapters(jax.random.key(0), base, adapter)
    # Full has no low rank: the same noise on every weight would drown the model.
    spread = std if method != "full" else 0.1 * std
    noisy = trees.map_with_names(
        lambda _, x: x + jnp.asarray(spread * rng.standard_normal(x.shape), x.dtype), adapters
    )
    return fuse(base, adapter, noisy)


def same(ours: list[list[int]], theirs: list[list[int]]) -> str:
    """Returns how many tokens are equal, as text."""
    pairs = [(a, b) for x, y in zip(ours, theirs, strict=True) for a, b in zip(x, y, strict=True)]
    return f"{sum(a == b for a, b in pairs)} of {len(pairs)}"


def scores(model: Any, rows: list[list[int]]) -> dict[str, Any]:
    """{"logp": log p of each next token of `rows`, "top": the likeliest token there}."""
    import numpy as np

    from zflora_jax import forward

    out: dict[str, Any] = {"logp": [], "top": []}
    for row in rows:
        tokens = np.zeros((1, max(map(len, rows))), np.int32)  # of one length: one program
        tokens[0, : len(row)] = row
        logits = np.asarray(forward(model, tokens)[0, : len(row) - 1], np.float64)
        picked = logits[np.arange(len(logits)), row[1:]]
        out["logp"].append((picked - np.logaddexp.reduce(logits, -1)).tolist())
        out["top"].append(logits.argmax(-1).tolist())
    return out


def ours(model: Any, ids: list[list[int]]) -> dict[str, Any]:
    """This project's greedy tokens after the first of `ids`, the prompts, and `scores`."""
    from zflora_jax import generate_tokens

    some = ids[: len(PROMPTS)]
    tokens = generate_tokens(model, some, max_new_tokens=NEW_TOKENS, stop_token_ids=())
    return {"tokens": [list(map(int, row)) for row in tokens], **scores(model, ids)}


def verdict(found: dict[str, Any], want: dict[str, Any]) -> dict[str, Any]:
    """Compares answers, as far as there are such: {"tokens": as text, "mean", "max": |d log p| in
    nats, "signed": mean d log p, "top-1": share of equal ones}; or `found`'s "error".
    """
    import numpy as np

    out = {"error": found["error"]} if "error" in found else {}
    if "tokens" in found:
        out["tokens"] = same(want["tokens"], found["tokens"][: len(want["tokens"])])
    if "logp" in found:
        gaps = np.concatenate(found["logp"]) - np.concatenate(want["logp"])
        sizes = {"mean": np.abs(gaps).mean(), "max": np.abs(gaps).max(), "signed": gaps.mean()}
        out |= {name: float(size) for name, size in sizes.items()}
    if "top" in found:
        equal = np.equal(np.concatenate(found["top"]), np.concatenate(want["top"]))
        out["top-1"] = float(equal.mean())
    return out


def cell(found: dict[str, Any] | None, exact: bool) -> str:
    """A verdict as text. exact: In float32, where only the largest difference matters."""
    if found is None or "error" in found:
        return "-" if found is None else f"refused: {found['error']}"
    parts = [found["tokens"].replace(" of ", "/")]
    if "mean" in found:
        parts.append(f"{found['max']:.0e}" if exact else f"{found['mean']:.4f}")
    return ", ".join(parts + ([] if exact else [f"{100 * found['top-1']:.1f}%"]))


def check(name: str, methods: Sequence[str], args: argparse.Namespace) -> list[dict[str, Any]]:
    """Exports a base and its fusions and asks every consumer; rows of the table."""
    from zflora_jax import load_model, save_gguf, save_hf
    from zflora_jax.hf.save import QWEN2_IN_VLLM

    smollm2 = load_model("smollm2-135m")
    base = smollm2 if name == BASES[0] else real_size(name, smollm2.tokenizer)
    text = Path(__file__).parent.parent.joinpath("docs", "method.md").read_text(encoding="utf-8")
    *ids, text_ids = [base.tokenizer(text)["input_ids"] for text in (*PROMPTS, text)]
    ids += [text_ids[i * CHUNK : (i + 1) * CHUNK] for i in range(CHUNKS)]
    rows, wants, jobs = [], [], []
    asks = set(args.consumers) - (set() if base is smollm2 else set(CONSUMERS))
    for method in methods:
        model, export = fused(base, method, RANK, STD), args.dir / "exports" / f"{name}-{method}"
        wants.append(ours(model, ids))
        for dtype in DTYPES:
            report = save_hf(path := f"{export}-{dtype}", model, dtype=dtype)
            jobs.append({"export": path, "dtype": dtype})
            if "hf-overrides" in report.get("misread by", ""):
                jobs[-1]["overrides"] = json.loads(QWEN2_IN_VLLM)
        shape = json.loads(Path(path, "config.json").read_text(encoding="utf-8"))
        row = {"base": name, "model": method, **{key: shape[key] for key in WIDTHS}}
        row["adapter"] = verdict(wants[-1], wants[0])
        row["ours bfloat16"] = verdict(ours(load_model(path, "bfloat16"), ids), wants[-1])
        if "llama.cpp" in asks:
            save_gguf(gguf := export.with_suffix(".gguf"), model, "f32")
            answer = ask(args.python, "llama.cpp", {"gguf": str(gguf), "ids": ids})
            row["llama.cpp"] = verdict(answer, wants[-1])
            gguf.unlink()
        rows.append(row)
        print(row, flush=True)

    def asked(python: str, worker: str, each: list[Any], **job: Any) -> list[dict[str, Any]]:
        found = ask(python, worker, job | {"each": each})
        return found if isinstance(found, list) else [found] * len(each)

    with ThreadPoolExecutor() as pool:
        pythons = {"transformers": args.python, "vllm": args.vllm_python}
        waits = {x: pool.submit(asked, pythons[x], x, jobs, ids=ids) for x in SERVERS if x in asks}
    for key, wait in waits.items():
        for i, answer in enumerate(wait.result()):
            rows[i // 2][f"{key} {jobs[i]['dtype']}"] = verdict(answer, wants[i // 2])
    return rows


def version(python: str, package: str) -> str:
    """The version of a package in the environment of `python`."""
    code = f"import importlib.metadata as m; print(m.version('{package}'))"
    return subprocess.run([python, "-c", code], capture_output=True, text=True).stdout.strip()


def _equal(found: dict[str, Any]) -> bool:
    first, _, last = found.get("tokens", "").partition(" of ")
    return first == last != ""


def page(results: dict[str, Any]) -> str:
    """The page of all bases' rows."""
    from zflora_jax.reporting.provenance import origin_line
    from zflora_jax.reporting.tables import markdown_table

    half = {f"{key} bfloat16": title for key, title in {"ours": "this project", **SERVERS}.items()}
    shown, ratios, base = [], [], {}
    for row in (row for one in results.values() for row in one["rows"]):
        base = row if row["model"] == "base" else base
        there = [key for key in half if row is not base and "mean" in row.get(key, {})]
        ratios += [row[key]["mean"] / base[key]["mean"] for key in there]
        shown.append({key: row[key] for key in ("base", "model")})
        shown[-1]["hidden, head, MLP"] = ", ".join(str(row[key]) for key in WIDTHS)
        shown[-1]["adapter"] = f"{row['adapter']['mean']:.2f}"
        shown[-1] |= {t: cell(row.get(f"{key} float32"), True) for key, t in SERVERS.items()}
        shown[-1] |= {title: cell(row.get(key), True) for key, title in CONSUMERS.items()}
        shown[-1] |= {f"{t}, bfloat16": cell(row.get(key), False) for key, t in half.items()}
    keys = (*(f"{key} float32" for key in SERVERS), *CONSUMERS)
    rows = [row for one in results.values() for row in one["rows"]]
    exact = [row[key] for row in rows for key in keys if key in row]
    one = next(reversed(results.values()))
    text = f"""\
# Software that reads exports

{sum(map(_equal, exact))} of {len(exact)} comparisons in float32 gave this project's tokens.
bfloat16 moves log p of a fused model {min(ratios):.2f} to {max(ratios):.2f} times as far as log p
of its base.

{markdown_table(shown, list(shown[0]))}

- adapter: mean |d log p| between model and base, in float32. Rank {RANK}, noise of std {STD}.
- transformers, vLLM: equal greedy tokens, and the largest |d log p| to this project, in nats.
- llama.cpp: equal greedy tokens from a GGUF file in f32.
- bfloat16: the same against this project in float32, with the mean |d log p|, and how often the
  likeliest token is equal.
- SmolLM2-135M has its weights; the Qwen sizes have 6 layers, random weights and SmolLM2's tokens.
  vLLM got the options that the report of a Qwen2 export names.

{", ".join(f"{k} {v}" for k, v in one["versions"].items())}.

"""
    return text + "\n\n".join(origin_line(one["environment"]) for one in results.values()) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    vllm, others = "the Python that has vLLM", "the Python that has transformers and xllamacpp"
    parser.add_argument("--vllm-python", required=True, metavar="FILE", help=vllm)
    parser.add_argument("--python", required=True, metavar="FILE", help=others)
    parser.add_argument("--dir", required=True, type=Path, help="where exports and GGUF files go")
    parser.add_argument("--bases", nargs="+", choices=BASES, default=BASES)
    parser.add_argument("--methods", nargs="+", metavar="METHOD", help="default: all")
    every = (*SERVERS, *CONSUMERS)
    parser.add_argument("--consumers", nargs="+", choices=every, default=every)
    parser.add_argument("--out", default="results/consumers")
    args = parser.parse_args()
    from zflora_jax.core.adapter_config import METHODS
    from zflora_jax.reporting.files import write_result
    from zflora_jax.reporting.provenance import environment

    env, file = environment(), Path(f"{args.out}.json")
    where = dict.fromkeys(("transformers", "xllamacpp"), args.python)
    where["vllm-cpu"] = args.vllm_python
    versions = {name: version(python, name) for name, python in where.items()}
    for name in args.bases:
        new = {row["model"]: row for row in check(name, ["base", *(args.methods or METHODS)], args)}
        results = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
        old = {row["model"]: row for row in results.get(name, {}).get("rows", [])}
        merged = {model: old.get(model, {}) | new.get(model, {}) for model in ("base", *METHODS)}
        rows = [row for row in merged.values() if row]
        results[name] = {"rows": rows, "versions": versions, "environment": env}
        results = {base: results[base] for base in BASES if base in results}
        write_result(args.out, results, page(results))


if __name__ == "__main__":
    main()
