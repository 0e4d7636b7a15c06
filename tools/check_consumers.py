"""Checks that vLLM, lm-evaluation-harness (with transformers) and llama.cpp (of GGUF files in f32)
compute the same from an export as this project.

Command: tools/check_consumers.sh, which makes the environments. Exports SmolLM2-135M as it is and
fused by each of the six methods with perturbed adapters, float32. Every consumer generates greedily
from the same token ids, or the same text, and lm-evaluation-harness also scores the options of a
local task. Writes results/consumers.json and .md. A row reports an export that a consumer refuses
or computes differently.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
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
CONSUMERS = {"vllm": "vLLM", "lm_eval": "lm-evaluation-harness", "llama.cpp": "llama.cpp"}
WIDTHS = ("hidden_size", "head_dim", "intermediate_size")
CHOICES = [
    ("The capital of France is", ["Paris", "Berlin", "Madrid"]),
    (
        "Water boils at a temperature of",
        ["100 degrees Celsius", "10 degrees Celsius", "1000 degrees Celsius"],
    ),
    ("The opposite of hot is", ["cold", "blue", "fast"]),
    ("Two plus two is", ["four", "seven", "twenty"]),
    ("The sun rises in the", ["east", "west", "north"]),
    ("A dog is a kind of", ["animal", "number", "river"]),
]
TASK = """
task: zflora_{kind}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}}}
test_split: test
doc_to_text: "{{{{text}}}}"
output_type: {output_type}
{rest}
"""


def ask(python: str, worker: str, job: dict[str, Any]) -> dict[str, Any]:
    """Run a worker in another environment.

    Args:
      python: the interpreter of the environment.
      worker: a key of `consumer_workers.WORKERS`.
      job: its argument.

    Returns:
      Its answer, or {"error": the last line of its output}.
    """
    env = os.environ | {
        "VLLM_CPU_KVCACHE_SPACE": "2",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "PYTHONPATH": "",
    }
    env |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR"}
    command = [python, consumer_workers.__file__, worker, json.dumps(job)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=900)
    except subprocess.TimeoutExpired:
        return {"error": "no answer within 15 minutes"}
    return (
        json.loads(done.stdout.splitlines()[-1])
        if done.returncode == 0
        else {"error": last_words(done.stderr)}
    )


def last_words(stderr: str) -> str:
    """The last line with an error, or else the last line."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    errors = [line for line in lines if "Error" in line or "error" in line]
    from zflora_jax.reporting.provenance import relative_paths

    return relative_paths((errors or lines or ["no message"])[-1][:200])


def write_tasks(folder: Path) -> None:
    """Write the local tasks of lm-evaluation-harness: options to score, and texts to continue."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = {
        "choice": [{"text": text, "options": options, "gold": 0} for text, options in CHOICES],
        "text": [{"text": prompt} for prompt in PROMPTS],
    }
    rest = {
        "choice": 'doc_to_choice: "{{options}}"\ndoc_to_target: gold\nmetric_list: [{metric: acc}]',
        "text": (
            'doc_to_target: ""\nmetric_list: [{metric: exact_match}]\n'
            f"generation_kwargs: {{until: [], do_sample: false, max_gen_toks: {NEW_TOKENS}}}"
        ),
    }
    for kind, output_type in (("choice", "multiple_choice"), ("text", "generate_until")):
        (folder / f"{kind}.jsonl").write_text(
            "".join(json.dumps(row) + "\n" for row in rows[kind]), encoding="utf-8"
        )
        path = str((folder / f"{kind}.jsonl").resolve())
        (folder / f"{kind}.yaml").write_text(
            TASK.format(kind=kind, rows=path, output_type=output_type, rest=rest[kind]),
            encoding="utf-8",
        )


def small_model(family: str) -> Any:
    """A small model of a family with random weights, whose likeliest token is a clear one."""
    import jax

    from zflora_jax.core.presets import preset
    from zflora_jax.nn.llama import random_model

    config = preset("tiny").replace(
        family=family,
        hidden_size=256,
        intermediate_size=512,
        num_heads=4,
        num_kv_heads=2,
        head_dim=64,
        vocab_size=512,
        nope_layers=(1,) if family == "smollm3" else (),
        sliding_window=16 if family == "mistral" else None,
        max_position_embeddings=512,
        tie_word_embeddings=False,
    )
    model = random_model(config, jax.random.key(0))
    # So large that attention is far from uniform.
    model.params = jax.tree.map(lambda x: 3.0 * x if x.ndim > 2 else x, model.params)
    return model


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


def ours(model: Any, ids: list[list[int]]) -> dict[str, Any]:
    """This project's tokens, texts and likelihoods."""
    from zflora_jax import generate_tokens, option_log_likelihoods

    tokens = generate_tokens(model, ids, max_new_tokens=NEW_TOKENS, stop_token_ids=())
    until_end = generate_tokens(model, ids, max_new_tokens=NEW_TOKENS)
    read = lambda text: model.tokenizer(text)["input_ids"]  # noqa: E731
    starts = [read(text) for text, _ in CHOICES]
    ends = [
        [read(f"{text} {option}")[len(start) :] for option in options]
        for (text, options), start in zip(CHOICES, starts, strict=True)
    ]
    return {
        "tokens": [list(map(int, row)) for row in tokens],
        "texts": [model.tokenizer.decode(row, skip_special_tokens=True) for row in until_end],
        "likelihoods": [row.tolist() for row in option_log_likelihoods(model, starts, ends)],
    }


def verdict(found: dict[str, Any], want: dict[str, Any]) -> dict[str, Any]:
    """Compare a consumer's answers with this project's.

    Args:
      found: the consumer's, or {"error": ...}.
      want: this project's, of `ours`.
    """
    if "error" in found:
        return {"reads": False, "says": found["error"]}
    out: dict[str, Any] = {"reads": True}
    if "tokens" in found:
        pairs = list(zip(found["tokens"], want["tokens"], strict=True))
        out["same"] = all(a == b for a, b in pairs)
        out["tokens_until_they_part"] = min(
            next((i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), NEW_TOKENS)
            for a, b in pairs
        )
    if "texts" in found:
        out["same"] = found["texts"] == want["texts"]
        gaps = [
            abs(a - b)
            for x, y in zip(found["likelihoods"], want["likelihoods"], strict=True)
            for a, b in zip(x, y, strict=True)
        ]
        out |= {
            "max_likelihood_gap": max(gaps, key=lambda gap: (gap != gap, gap)),
            "accuracy": found["accuracy"],
        }
    return out


def cell(row: dict[str, Any], name: str) -> str:
    """The verdict on a consumer as text."""
    found = row[name]
    if not found["reads"]:
        return f"refused: {found['says']}"
    if found["same"]:
        return "same" + (
            f", likelihoods within {found['max_likelihood_gap']:.1e} nats"
            if "max_likelihood_gap" in found
            else ""
        )
    return (
        f"parts after {found['tokens_until_they_part']} tokens"
        if "tokens_until_they_part" in found
        else "other text"
    )


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    vllm, others = "the Python that has vLLM", "the Python that has lm-eval and xllamacpp"
    parser.add_argument("--vllm-python", required=True, metavar="FILE", help=vllm)
    parser.add_argument("--python", required=True, metavar="FILE", help=others)
    parser.add_argument("--dir", required=True, type=Path, help="where exports and GGUF files go")
    parser.add_argument("--out", default="results/consumers")
    return parser.parse_args()


def check(method: str, base: Any, ids: list[list[int]], args: argparse.Namespace) -> dict[str, Any]:
    """Export the base, or a model fused by `method`, and ask every consumer; a row of the table."""
    from zflora_jax import save_gguf, save_hf

    model, export = fused(base, method, RANK, STD), args.dir / "exports" / method
    gguf = args.dir / "exports" / f"{method}.gguf"
    save_hf(export, model)
    shape = json.loads((export / "config.json").read_text(encoding="utf-8"))
    want = ours(model, ids)
    tasks = str(args.dir / "tasks")
    found = {
        "vllm": ask(args.vllm_python, "vllm", {"export": str(export), "ids": ids}),
        "lm_eval": ask(args.python, "lm_eval", {"export": str(export), "tasks": tasks}),
    }
    save_gguf(gguf, model, "f32")
    found["llama.cpp"] = ask(args.python, "llama.cpp", {"gguf": str(gguf), "ids": ids})
    gguf.unlink(missing_ok=True)
    row = {"model": method, **{key: shape[key] for key in WIDTHS}}
    return row | {name: verdict(answer, want) for name, answer in found.items()}


def version(python: str, package: str) -> str:
    """The version of a package in the environment of `python`."""
    code = f"import importlib.metadata as m; print(m.version('{package}'))"
    return subprocess.run([python, "-c", code], capture_output=True, text=True).stdout.strip()


def main() -> None:
    args = arguments()
    from zflora_jax import load_model
    from zflora_jax.core.adapter_config import METHODS
    from zflora_jax.reporting.files import atomic_write, write_json
    from zflora_jax.reporting.provenance import environment, origin_line
    from zflora_jax.reporting.tables import markdown_table

    env, base = environment(), load_model("smollm2-135m")
    ids = [base.tokenizer(text)["input_ids"] for text in PROMPTS]
    write_tasks(args.dir / "tasks")
    rows: list[dict[str, Any]] = []
    for method in ("base", *METHODS):
        rows.append(check(method, base, ids, args))
        print({name: cell(rows[-1], name) for name in CONSUMERS}, flush=True)
    shown = [
        {key: row[key] for key in ("model", *WIDTHS)}
        | {title: cell(row, name) for name, title in CONSUMERS.items()}
        for row in rows
    ]
    versions = {"vllm-cpu": version(args.vllm_python, "vllm-cpu")}
    versions |= {
        name: version(args.python, name) for name in ("lm-eval", "transformers", "xllamacpp")
    }
    settings = {"rank": RANK, "std": STD, "new_tokens": NEW_TOKENS}
    write_json(
        f"{args.out}.json", {"rows": rows, "versions": versions, **settings, "environment": env}
    )
    text = ["# What reads the exports", "", *(__doc__ or "").splitlines()[2:], ""]
    text += [
        f"{len(PROMPTS)} prompts, {NEW_TOKENS} tokens each, rank {RANK}, noise of std {STD}. "
        + ", ".join(f"{k} {v}" for k, v in versions.items())
        + "."
    ]
    text += ["", markdown_table(shown, list(shown[0])), "", origin_line(env), ""]
    atomic_write(f"{args.out}.md", "\n".join(text).encode())


if __name__ == "__main__":
    main()
