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

Both torch ways run a stock LlamaForCausalLM loaded from an export. Writes likelihood_speed.json and
.md to --out.

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


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--data-dir",
        type=Path,
        required=True,
        help="the folder that holds llm_adapters/dataset/ARC-Easy/test.json",
    )
    parser.add_argument("--rows", type=int, default=200, help="questions (default: 200)")
    parser.add_argument(
        "--rounds", type=int, default=3, help="times that all rows are scored by each, (default: 3)"
    )
    parser.add_argument(
        "--chunks",
        type=int,
        default=2,
        help="parts of the rows in which they take turns (default: 2)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("results"),
        help="directory of the results (default: results)",
    )
    args = parser.parse_args()

    # torch's threads spin while they wait for each other, which where other work wants the cores
    # makes them slow and burns CPU time: let them sleep.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    import torch
    import transformers

    from zflora_jax import load_model, save_hf
    from zflora_jax.data.prompts import encode_prompt_texts, render
    from zflora_jax.inference.likelihood import option_log_likelihoods
    from zflora_jax.reporting.files import atomic_write, write_json
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
    flat = {name: np.concatenate(found).astype(np.float64) for name, found in scores.items()}
    best = {name: [int(np.argmax(row)) for row in found] for name, found in scores.items()}
    table: list[dict[str, Any]] = [
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
        for name in scorers
    ]
    result = {
        "table": table,
        "compile_seconds": first - table[0]["seconds"],
        "within_limit": table[0]["max_difference"] <= LIMIT,
        "limit": LIMIT,
        "seconds": seconds,
        "rows": len(rows),
        "options": len(flat["ours"]),
        "prompt_tokens": sum(map(len, prompts)),
        "sequence_tokens": sum(
            len(p) + len(o) for p, row in zip(prompts, options, strict=True) for o in row
        ),
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
    write_json(args.out / "likelihood_speed.json", result)
    atomic_write(args.out / "likelihood_speed.md", report(result).encode())
    print(report(result))


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


def report(result: dict[str, Any]) -> str:
    from zflora_jax.reporting.provenance import origin_line
    from zflora_jax.reporting.tables import markdown_table

    env, versions = result["environment"], result["versions"]
    spread = "; ".join(
        f"{name} {s[..., 0].sum(1).min():.1f}-{s[..., 0].sum(1).max():.1f} s"
        for name, s in result["seconds"].items()
    )
    return "\n".join(
        [
            "# Option log-likelihoods: speed against transformers and torch",
            "",
            (
                f"SmolLM2-135M-Instruct, float32, the first {result['rows']} ARC-easy test"
                f" questions of LLM-Adapters with {result['options']} options"
            ),
            '("the correct answer is answerK" after the prompt in the chat template): '
            f"{result['prompt_tokens']:,} tokens of prompts, {result['sequence_tokens']:,} with"
            " each",
            (
                f"option a sequence of its own. Batches of {result['batch_size']}, all"
                f" {env['cpu_count']} cores."
            ),
            (
                f"The ways take turns over {result['chunks']} parts of the rows in"
                f" {result['rounds']} rounds, compiled and warm; medians over rounds, of ratios"
            ),
            (
                "over parts and rounds. CPU seconds are what other work on the machine disturbs"
                f" least (load average before: {result['load_before']:.1f})."
            ),
            "",
            (
                "- ours: `zflora_jax.option_log_likelihoods`; what prompts and options share is fed"
                " once."
            ),
            (
                "- torch_sequences: each prompt + option a right-padded sequence of its own,"
                " log_softmax of all logits, gathered."
            ),
            (
                "- torch_once: a stronger baseline, possible because these options differ in their"
                " last token alone: each prompt and what its options"
            ),
            "  share fed once, left-padded, logits of the last positions alone (`logits_to_keep`).",
            "",
            markdown_table(result["table"], COLUMNS),
            "",
            (
                f"Ours compiles for about {result['compile_seconds']:.0f} s, once. Spread over"
                f" rounds: {spread}."
            ),
            (
                f"Differences of ours are {'within' if result['within_limit'] else 'BEYOND'}"
                f" {result['limit']} nats."
            ),
            "A CPU ratio says nothing about GPUs.",
            "",
            origin_line(env),
            (
                f"Python {env['python']}, torch {versions['torch']}, transformers"
                f" {versions['transformers']}; nothing is drawn, so there is no seed."
            ),
            "",
        ]
    )


if __name__ == "__main__":
    main()
