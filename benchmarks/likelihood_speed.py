"""Option log-likelihoods of multiple-choice questions: `option_log_likelihoods` against
transformers and torch, on the same token ids.

The first --rows test questions of ARC-easy in LLM-Adapters' form, in the model's chat template;
options "the correct answer is answer1", ...; the packaged SmolLM2-135M in float32. Three ways of
scoring them, taking turns in one process:

    ours             zflora_jax.option_log_likelihoods
    torch_sequences  each prompt + option a sequence of its own, sorted by length, padded on the
                     right, log_softmax of all logits, then gathered
    torch_once       a stronger baseline: each prompt and what its options share fed once, logits of
                     the last positions alone (logits_to_keep); possible where options differ
                     in their last token only, as they do here

Both torch ways run a stock LlamaForCausalLM loaded from an export. Writes its page to --out.

    python benchmarks/likelihood_speed.py --data-dir DIR --rows 200
"""

from __future__ import annotations

import argparse
import json
import os
import re
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

BATCH = 16
LIMIT = 1e-3  # max |difference| of an option's log-likelihood, nats
Prompts = list[list[int]]
Options = list[list[list[int]]]
Scorer = Callable[[Prompts, Options], list[np.ndarray]]


def read_rows(data_dir: Path, count: int) -> list[dict[str, Any]]:
    """instruction, options (texts) and the index of the right one, of the first `count`
    test rows.
    """
    rows = json.loads(
        (data_dir / "llm_adapters" / "dataset" / "ARC-Easy" / "test.json").read_text(
            encoding="utf-8"
        )
    )[:count]
    found = []
    for row in rows:
        names = re.findall(r"answer\d", row["instruction"].rpartition("Answer format:")[2])
        options = [f"the correct answer is {name}" for name in names]
        found.append(
            {
                "instruction": row["instruction"],
                "options": options,
                "right": options.index(row["output"]),
            }
        )
    return found


def batches(lengths: list[int]) -> list[list[int]]:
    """Indices by length, the longest first, BATCH at a time."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    return [order[n : n + BATCH] for n in range(0, len(order), BATCH)]


def torch_sequences(stock: Any) -> Scorer:
    import torch

    def score(prompts: Prompts, options: Options) -> list[np.ndarray]:
        flat = [
            (prompt, option) for prompt, row in zip(prompts, options, strict=True) for option in row
        ]
        sums = np.zeros(len(flat), np.float32)
        for some in batches([len(p) + len(o) for p, o in flat]):
            width = max(len(flat[i][0]) + len(flat[i][1]) for i in some)
            ids, mask = (
                torch.zeros((len(some), width), dtype=torch.long),
                torch.zeros((len(some), width), dtype=torch.long),
            )
            for n, i in enumerate(some):
                sequence = torch.tensor(flat[i][0] + flat[i][1])
                ids[n, : len(sequence)], mask[n, : len(sequence)] = sequence, 1
            with torch.inference_mode():
                log_p = torch.log_softmax(
                    stock(ids, attention_mask=mask, use_cache=False).logits, dim=-1
                )
                for n, i in enumerate(some):
                    prompt, option = flat[i]
                    where = slice(len(prompt) - 1, len(prompt) + len(option) - 1)
                    sums[i] = log_p[n, where].gather(1, torch.tensor(option)[:, None]).sum()
        return np.split(sums, np.cumsum([len(row) for row in options])[:-1])

    return score


def torch_once(stock: Any) -> Scorer:
    import torch

    def score(prompts: Prompts, options: Options) -> list[np.ndarray]:
        shared = [row[0][:-1] for row in options]
        assert all(
            option[:-1] == start
            for row, start in zip(options, shared, strict=True)
            for option in row
        ), "options differ before their last token"
        fed, found = (
            [p + s for p, s in zip(prompts, shared, strict=True)],
            [np.zeros(0)] * len(prompts),
        )
        for some in batches(list(map(len, fed))):
            width = max(len(fed[i]) for i in some)
            ids = torch.tensor([[0] * (width - len(fed[i])) + fed[i] for i in some])
            mask = torch.tensor([[0] * (width - len(fed[i])) + [1] * len(fed[i]) for i in some])
            positions = (mask.cumsum(1) - 1).clamp(min=0)
            keep = 1 + max(len(shared[i]) for i in some)
            with torch.inference_mode():
                logits = stock(
                    ids,
                    attention_mask=mask,
                    position_ids=positions,
                    use_cache=False,
                    logits_to_keep=keep,
                ).logits
                log_p = torch.log_softmax(logits, dim=-1).numpy()
            for n, i in enumerate(some):
                start = shared[i]
                before = log_p[
                    n, keep - 1 - len(start) + np.arange(len(start)), np.asarray(start, int)
                ].sum()
                found[i] = before + log_p[n, -1, [option[-1] for option in options[i]]]
        return found

    return score


def timed(
    scorer: Scorer, prompts: Prompts, options: Options
) -> tuple[list[float], list[np.ndarray]]:
    """([seconds on the clock, seconds of CPU], scores)."""
    start, cpu = time.perf_counter(), time.process_time()
    found = scorer(prompts, options)
    return [time.perf_counter() - start, time.process_time() - cpu], found


def take_turns(
    scorers: dict[str, Scorer], prompts: Prompts, options: Options, chunks: int, rounds: int
) -> tuple[Any, Any, Any]:
    """(seconds of a first pass of ours, which compiles; seconds by name [rounds, chunks, clock and
    CPU]; scores by name). The rows are cut into parts of like lengths; every part goes through all
    ways, each time another one first.
    """
    parts = [list(range(n, len(prompts), chunks)) for n in range(chunks)]

    def score(name: str, part: list[int]) -> tuple[list[float], list[np.ndarray]]:
        return timed(scorers[name], [prompts[i] for i in part], [options[i] for i in part])

    first = sum(score("ours", part)[0][0] for part in parts)
    for name in scorers:
        score(name, parts[0][:BATCH])  # warm
    seconds = {name: np.zeros((rounds, chunks, 2)) for name in scorers}
    scores: dict[str, list[np.ndarray]] = {name: [np.zeros(0)] * len(prompts) for name in scorers}
    turn = list(scorers)
    for r in range(rounds):
        for c, part in enumerate(parts):
            for name in turn:
                seconds[name][r, c], found = score(name, part)
                for i, row in zip(part, found, strict=True):
                    scores[name][i] = row
            turn = turn[1:] + turn[:1]
            print(
                f"round {r + 1}, part {c + 1}:",
                {name: seconds[name][r, c].round(2).tolist() for name in scorers},
                flush=True,
            )
    return first, seconds, scores


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "--data-dir", type=Path, required=True, help="holds llm_adapters/dataset/ARC-Easy/test.json"
    )
    add("--rows", type=int, default=200, help="questions (default: 200)")
    add("--rounds", type=int, default=3, help="times each way scores all rows (default: 3)")
    add("--chunks", type=int, default=2, help="parts of the rows, taken by turns (default: 2)")
    add("--out", type=Path, default=Path("results"), help="a directory (default: results)")
    return parser.parse_args()


def table(
    seconds: dict[str, np.ndarray], scores: dict[str, list[np.ndarray]], rows: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """A row per way: its times, their ratios to ours, its scores beside torch_sequences'."""
    flat = {name: np.concatenate(found).astype(np.float64) for name, found in scores.items()}
    best = {name: [int(np.argmax(row)) for row in found] for name, found in scores.items()}
    return [
        {
            "way": name,
            "seconds": float(np.median(seconds[name][..., 0].sum(1))),
            "ratio": float(np.median(seconds[name][..., 0] / seconds["ours"][..., 0])),
            "cpu_seconds": float(np.median(seconds[name][..., 1].sum(1))),
            "cpu_ratio": float(np.median(seconds[name][..., 1] / seconds["ours"][..., 1])),
            "max_difference": float(np.abs(flat[name] - flat["torch_sequences"]).max()),
            "same_choice": float(
                np.mean([a == b for a, b in zip(best[name], best["torch_sequences"], strict=True)])
            ),
            "accuracy": float(
                np.mean([b == row["right"] for b, row in zip(best[name], rows, strict=True)])
            ),
        }
        for name in scores
    ]


def measure(args: argparse.Namespace) -> dict[str, Any]:
    # torch's threads spin while they wait for each other, which where other work wants the cores
    # makes them slow and burns CPU time: let them sleep.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    import torch
    import transformers

    from zflora_jax import load_model, save_hf
    from zflora_jax.data.prompts import encode_prompt_texts, render
    from zflora_jax.inference.likelihood import option_log_likelihoods
    from zflora_jax.reporting.provenance import environment

    load = os.getloadavg()[0]
    # now: the code that this process has loaded, whatever is committed while it runs.
    origin = environment()
    torch.set_num_threads(origin["cpu_count"])
    rows, model = read_rows(args.data_dir, args.rows), load_model("smollm2-135m")
    prompts = encode_prompt_texts(
        model.tokenizer, [render(model.tokenizer, "chat", row["instruction"]) for row in rows]
    )
    options = [
        [model.tokenizer(text, add_special_tokens=False)["input_ids"] for text in row["options"]]
        for row in rows
    ]
    with tempfile.TemporaryDirectory() as folder:
        save_hf(Path(folder, "export"), model)
        stock = transformers.AutoModelForCausalLM.from_pretrained(
            Path(folder, "export"), dtype=torch.float32
        ).eval()
        scorers: dict[str, Scorer] = {
            "ours": lambda p, o: option_log_likelihoods(model, p, o, batch_size=BATCH),
            "torch_sequences": torch_sequences(stock),
            "torch_once": torch_once(stock),
        }
        first, seconds, scores = take_turns(scorers, prompts, options, args.chunks, args.rounds)
    ways = table(seconds, scores, rows)
    return {
        "table": ways,
        "compile_seconds": first - ways[0]["seconds"],
        "within_limit": ways[0]["max_difference"] <= LIMIT,
        "limit": LIMIT,
        "seconds": seconds,
        "rows": len(rows),
        "options": sum(map(len, options)),
        **token_counts(prompts, options),
        "batch_size": BATCH,
        "rounds": args.rounds,
        "chunks": args.chunks,
        "threads": {
            "torch": torch.get_num_threads(),
            "OMP_WAIT_POLICY": os.environ["OMP_WAIT_POLICY"],
        },
        "load_before": load,
        "seed": None,  # nothing is drawn
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "environment": origin,
    }


def token_counts(prompts: Prompts, options: Options) -> dict[str, int]:
    """Tokens of the prompts alone, and with a sequence of its own for each option."""
    pairs = zip(prompts, options, strict=True)
    return {
        "prompt_tokens": sum(map(len, prompts)),
        "sequence_tokens": sum(len(p) + len(o) for p, row in pairs for o in row),
    }


def main() -> None:
    from zflora_jax.reporting.files import write_result

    args = parse_args()
    result = measure(args)
    write_result(args.out / "likelihood_speed", result, page(result))
    print(page(result))


COLUMNS = {
    "way": "way",
    "seconds": "seconds",
    "ratio": "x ours",
    "cpu_seconds": "CPU seconds",
    "cpu_ratio": "x ours",
    "max_difference": "max abs difference to torch_sequences (nats)",
    "same_choice": "same choice",
    "accuracy": "accuracy",
}


def page(result: dict[str, Any]) -> str:
    """The page of a result; `seconds` may be arrays or, as read from JSON, lists."""
    from zflora_jax.reporting.provenance import origin_line
    from zflora_jax.reporting.tables import markdown_table

    env, versions = result["environment"], result["versions"]
    totals = {name: np.asarray(s)[..., 0].sum(1) for name, s in result["seconds"].items()}
    spread = "; ".join(f"{name} {s.min():.1f}-{s.max():.1f} s" for name, s in totals.items())
    return f"""# Option log-likelihoods: speed against transformers and torch

SmolLM2-135M-Instruct, float32, the first {result["rows"]} ARC-easy test questions of LLM-Adapters
with {result["options"]} options ("the correct answer is answerK" after the prompt in the chat
template): {result["prompt_tokens"]:,} tokens of prompts, {result["sequence_tokens"]:,} with one
sequence per option. Batches of {result["batch_size"]}, all {env["cpu_count"]} cores. The ways take
turns over {result["chunks"]} parts of the rows in {result["rounds"]} rounds, compiled and warm.
Times are medians over rounds, ratios are medians over parts and rounds. Other work on the machine
disturbs CPU seconds least (load average before: {result["load_before"]:.1f}).

- ours: `zflora_jax.option_log_likelihoods`; tokens that prompts and options share are fed once.
- torch_sequences: one right-padded sequence for each prompt and option, log_softmax of all logits,
  gathered.
- torch_once: a stronger baseline, possible because these options differ in their last token alone:
  each prompt and the tokens that its options share are fed once, left-padded, with the logits of
  the last positions alone (`logits_to_keep`).

{markdown_table(result["table"], COLUMNS)}

Ours compiles for about {result["compile_seconds"]:.0f} s, once. Ranges over rounds: {spread}.
Differences of ours are {"within" if result["within_limit"] else "BEYOND"} {result["limit"]} nats.
A CPU ratio says nothing about GPUs.

{origin_line(env)}
Python {env["python"]}, torch {versions["torch"]}, transformers {versions["transformers"]}. There
is no seed: nothing is drawn.
"""


if __name__ == "__main__":
    main()
