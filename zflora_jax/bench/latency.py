"""TTFT and TPOT of base, adapters beside the base, and fused models, by turns in one process;
optionally of transformers and PEFT too.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from zflora_jax.adapters.packing import pack_for_decode
from zflora_jax.bench.baselines import decode_contenders
from zflora_jax.bench.contenders import BASE, FUSED, UNMERGED, contender, contenders, random_packed
from zflora_jax.bench.timing import Contender, bandwidth_meter, decode_turns, ratio, summary
from zflora_jax.core.fields import require
from zflora_jax.core.model import Model
from zflora_jax.core.model_config import LlamaConfig
from zflora_jax.inference.program import packed
from zflora_jax.reporting.files import write_result
from zflora_jax.reporting.plots import bars, curves
from zflora_jax.reporting.provenance import origin_line
from zflora_jax.reporting.tables import markdown_table

TableRow = dict[str, Any]


def decode_latency(
    models: Mapping[str, Model],
    *,
    prompt_length: int = 32,
    new_tokens: int = 32,
    batch: int = 1,
    repeats: int = 5,
) -> dict[str, dict[str, float]]:
    """Time greedy decode of random prompts, without stop tokens, by turns.

    Args:
      models: label -> base or fused model; packed here if it is not.
      prompt_length: tokens of a prompt.
      new_tokens: generated tokens, at least 2.
      batch: number of prompts.
      repeats: turns.

    Returns:
      Label -> {"ttft_ms", "tpot_ms", and each with _min and _max}: medians over the turns, in
      milliseconds.

    Raises:
      ConfigError: new_tokens is below 2 or repeats below 1.
    """
    require(new_tokens >= 2, f"new_tokens={new_tokens}: TPOT needs at least 2.")
    require(repeats >= 1, f"repeats={repeats}: must be at least 1.")
    ready = {
        label: contender(packed(model), batch, prompt_length, new_tokens)
        for label, model in models.items()
    }
    turns = decode_turns(ready, new_tokens, repeats)
    return {
        label: {k: v for name, values in found.items() for k, v in summary(values, name).items()}
        for label, found in turns.items()
    }


def measure(
    source: Model | LlamaConfig,
    *,
    dtype: str = "float32",
    methods: Sequence[str] = FUSED,
    ranks: Sequence[int] = (16,),
    batches: Sequence[int] = (1,),
    prompts: Sequence[int] = (32,),
    new_tokens: int = 32,
    repeats: int = 7,
    baselines: bool = False,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Measure the latency table.

    Every rank is measured at the first batch and prompt length, every batch and prompt length at
    the first rank.

    Args:
      source: a base model, or a shape for random weights.
      dtype: of random weights.
      methods: of `FUSED`.
      ranks: adapter ranks.
      batches: batch sizes.
      prompts: prompt lengths, in tokens.
      new_tokens: generated tokens, at least 2.
      repeats: turns.
      baselines: whether transformers and PEFT take part.
      say: called with a line after each measurement.

    Returns:
      {"rows": [...]}, a row per case and label: ttft_ms and tpot_ms (medians over turns, with _min
      and _max) and their ratios to the base's (medians over turns); read_bytes per token and
      bytes_ratio to the base's; floor_ms = read_bytes / the bandwidth measured in the turn, and
      floor_share = floor_ms / tpot_ms (medians); compile_s; memory_mb.

    Raises:
      ConfigError: a value is out of range, or a method cannot be fused.
    """
    config = source.config if isinstance(source, Model) else source
    _check(config, methods, ranks, batches, prompts, new_tokens, repeats)
    base = pack_for_decode(source) if isinstance(source, Model) else random_packed(source, dtype)
    meter, rows = bandwidth_meter(), list[TableRow]()
    cases = dict.fromkeys(
        [(rank, batches[0], prompts[0]) for rank in ranks]
        + [(ranks[0], b, p) for b in batches for p in prompts]
    )
    for rank, batch, prompt in cases:
        ready = contenders(source, base, rank, methods, (batch, prompt, new_tokens))
        if baselines:
            ready |= decode_contenders(config, dtype, rank, batch, prompt)
        turns = decode_turns(ready, new_tokens, repeats, meter)
        for label in turns:
            row = {"rank": rank, "batch": batch, "prompt": prompt, "label": label}
            rows.append(row | _row(label, ready, turns))
            say(_said(rows[-1]))
        del ready
    return {"rows": rows}


def _check(
    config: LlamaConfig,
    methods: Sequence[str],
    ranks: Sequence[int],
    batches: Sequence[int],
    prompts: Sequence[int],
    new_tokens: int,
    repeats: int,
) -> None:
    for name, values in (("ranks", ranks), ("batches", batches), ("prompts", prompts)):
        require(
            len(values) > 0 and min(values) >= 1,
            f"{name}={list(values)}: give at least one, each at least 1.",
        )
    require(new_tokens >= 2, f"new_tokens={new_tokens}: TPOT needs at least 2.")
    require(repeats >= 1, f"repeats={repeats}: must be at least 1.")
    unknown = [m for m in methods if m not in FUSED]
    require(
        not unknown,
        f"methods {unknown} cannot be fused into a base of the same depth here; choose from"
        f" {', '.join(FUSED)}.",
    )
    longest, limit = max(prompts) + new_tokens, config.max_position_embeddings
    require(
        longest <= limit,
        f"prompts of {max(prompts)} and {new_tokens} new tokens exceed the model's context of"
        f" {limit}.",
    )


def _row(label: str, ready: Mapping[str, Contender], turns: Mapping[str, Any]) -> TableRow:
    """What the turns say of one label."""
    found = {name: values for name, values in turns[label].items() if name != "floor_ms"}
    row: TableRow = {
        k: v for name, values in found.items() for k, v in summary(values, name).items()
    }
    for name in found:
        row[name.replace("_ms", "_ratio")] = ratio(found[name], turns[BASE][name])
    floors, size = turns[label].get("floor_ms"), ready[label].read_bytes
    if floors and size is not None:
        row["read_bytes"] = size
        row["bytes_ratio"] = size / (ready[BASE].read_bytes or size)
        row["floor_ms"] = statistics.median(floors)
        row["floor_share"] = ratio(floors, found["tpot_ms"])
    return row | ready[label].extra


def _said(row: TableRow) -> str:
    return (
        f"rank {row['rank']} batch {row['batch']} prompt {row['prompt']}  {row['label']:<28}"
        f" TTFT {row['ttft_ms']:9.2f} ms  TPOT {row['tpot_ms']:8.3f} ms  {row['tpot_ratio']:.3f} x"
        " base"
    )


def page(result: Mapping[str, Any], title: str, pictures: Sequence[str]) -> str:
    """The page in Markdown.

    Args:
      result: of `measure`, with "settings" and "environment" added.
      title: its heading.
      pictures: file names of the pictures to show.
    """
    env, settings = result["environment"], result["settings"]
    rates = [
        row["read_bytes"] / row["floor_ms"] / 1e6 for row in result["rows"] if "floor_ms" in row
    ]
    shown = [_line(row) for row in result["rows"]]
    lines = [
        f"# {title}",
        "",
        f"{settings['model']} ({settings['weights']} weights), {settings['dtype']},"
        f" {settings['new_tokens']} new tokens, greedy. Medians of {settings['repeats']} turns"
        " [minimum, maximum]; all rows of a case are interleaved in one process, without compile"
        " time.",
        "",
        '- "x base": the median over turns of the ratio within a turn.',
        '- "bytes": weights and half-filled cache, which a step has to read. "of floor": the time'
        " to read them over TPOT, at the read bandwidth measured in the same turn (medians of"
        f" {min(rates):.1f} to {max(rates):.1f} GB/s).",
        f'- "{UNMERGED}": LoRA\'s products beside packed base kernels. "merged": the base\'s shapes'
        " again.",
        "",
        markdown_table(shown, list(shown[0])),
        "",
        *[f"![{name}]({name})" for name in pictures],
        "",
        origin_line(env),
        "",
    ]
    return "\n".join(lines)


def _line(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row of the table, as text."""

    def text(key: str, form: str) -> str:
        return format(row[key], form) if key in row else "-"

    spread = f"[{row['tpot_ms_min']:.2f}, {row['tpot_ms_max']:.2f}]"
    return {
        "rank": row["rank"],
        "batch": row["batch"],
        "prompt": row["prompt"],
        "": row["label"],
        "TTFT, ms": text("ttft_ms", ".1f"),
        "x base": text("ttft_ratio", ".3f"),
        "TPOT, ms": f"{row['tpot_ms']:.2f} {spread}",
        "x base ": text("tpot_ratio", ".3f"),
        "bytes x base": text("bytes_ratio", ".3f"),
        "of floor": text("floor_share", ".2f"),
        "compile, s": text("compile_s", ".1f"),
        "memory, MB": text("memory_mb", ".0f"),
    }


def write(result: Mapping[str, Any], out: str | Path, title: str) -> None:
    """Write <out>.json, <out>.md and the pictures, as PNG and SVG.

    <out>-ratio shows TPOT over the base's in the first case; <out>-rank, if there are several
    ranks, TPOT by rank.

    Args:
      result: of `measure`, with "settings" and "environment" added.
      out: path without a suffix.
      title: of the page and the pictures.
    """
    out, rows = Path(out), result["rows"]
    first = [row for row in rows if all(row[k] == rows[0][k] for k in ("rank", "batch", "prompt"))]
    pictures = [f"{out.name}-ratio.png"]
    spread = {
        row["label"]: abs(
            (row["tpot_ms_max"] - row["tpot_ms_min"]) / 2 / row["tpot_ms"] * row["tpot_ratio"]
        )
        for row in first
    }
    what = (
        f"TPOT / base TPOT, rank {first[0]['rank']}, batch {first[0]['batch']}, prompt"
        f" {first[0]['prompt']}"
    )
    bars(
        {row["label"]: row["tpot_ratio"] for row in first},
        f"{out}-ratio",
        title,
        spread=spread,
        label=what,
    )
    by_rank = [row for row in rows if all(row[k] == rows[0][k] for k in ("batch", "prompt"))]
    if len({row["rank"] for row in by_rank}) > 1:
        pictures.append(f"{out.name}-rank.png")
        series: dict[str, dict[float, float]] = {}
        for row in by_rank:
            series.setdefault(row["label"], {})[row["rank"]] = row["tpot_ms"]
        curves(series, f"{out}-rank", title, x="rank", y="TPOT, ms")
    write_result(out, result, page(result, title, pictures))
