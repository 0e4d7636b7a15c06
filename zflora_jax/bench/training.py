"""Time and memory of one training step, of this project and of PEFT, from the same weights, batch,
mask, dtype and optimizer settings.
"""

from __future__ import annotations

import dataclasses
import gc
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from zflora_jax.adapters.counts import count_params
from zflora_jax.bench import baselines, peft
from zflora_jax.bench.case import Case
from zflora_jax.bench.timing import ratio, summary, turns
from zflora_jax.bench.training_step import PEFT, alone, load, matmul_rate, our_step
from zflora_jax.core.adapter_config import METHODS, AdapterConfig
from zflora_jax.core.architecture import count_base
from zflora_jax.core.fields import first_line, require
from zflora_jax.core.model import Model
from zflora_jax.core.model_config import LlamaConfig
from zflora_jax.hf.load import model_config
from zflora_jax.hf.save import save_hf
from zflora_jax.nn.quantize_model import quantize_model
from zflora_jax.reporting.files import write_result
from zflora_jax.reporting.plots import bars
from zflora_jax.reporting.provenance import origin_line
from zflora_jax.reporting.tables import markdown_table

TableRow = dict[str, Any]


def measure(
    cases: Sequence[Case],
    methods: Sequence[str],
    *,
    repeats: int = 5,
    with_peft: bool = True,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Measure the training table.

    Args:
      cases: set-ups.
      methods: of `METHODS`.
      repeats: turns.
      with_peft: whether PEFT's LoRA takes part.
      say: called with a line after each measurement.

    Returns:
      {"matmul_flops", "repeats", "failed", "rows"}. failed: a sentence for each case, or label
      of a case, that could not be measured. rows: one per case and label: step_ms (median over
      turns, with _min and _max) and step_ratio to PEFT's within a turn; tokens_per_s; flops_share
      of the matmul rate, at 4 N FLOPs per token (no gradient of a base kernel), 6 N for "full";
      compile_s (first step less a later one); peak_bytes and first_step_s, each of a process of its
      own; loss of the first step; trainable parameters.

    Raises:
      ConfigError: a value is out of range, PEFT is not installed, or nothing could be measured.
      ValueError: the first losses differ, so the labels do not do the same work.
    """
    unknown = [m for m in methods if m not in METHODS]
    known = f"methods={list(methods)}: choose from {', '.join(METHODS)}."
    require(len(methods) > 0 and not unknown, known)
    require(repeats >= 1, f"repeats={repeats}: must be at least 1.")
    if with_peft:
        peft.imports()  # fails before anything slow where PEFT is not installed
    failed: list[str] = []
    rates: dict[str, float] = {}
    rows: list[TableRow] = []
    for case in cases:  # before anything is measured
        context = model_config(case.model).max_position_embeddings
        require(case.length <= context, f"length={case.length} exceeds the context of {context}.")
    for case in cases:
        if case.dtype not in rates:
            rates[case.dtype] = matmul_rate(case.dtype)
        labels = [*methods, *([PEFT] if with_peft else [])]
        try:
            found, missing = _measure_case(case, labels, repeats, rates[case.dtype], say)
        except RuntimeError as error:  # the device's memory was too small, as a rule
            found, missing = [], [f"{case}: {first_line(error)}"]
            say(missing[0])
            gc.collect()
        rows += found
        failed += missing
    nothing = "nothing could be measured; try a smaller batch or length:"
    require(len(rows) > 0, "\n".join([nothing, *failed]))
    return {"matmul_flops": rates, "repeats": repeats, "failed": failed, "rows": rows}


def _measure_case(
    case: Case, labels: Sequence[str], repeats: int, rate: float, say: Callable[[str], None]
) -> tuple[list[TableRow], list[str]]:
    """(the rows of a case, why others could not be measured)."""
    model = load(case)
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder) / "base"
        save_hf(directory, model)
        apart, missing = _alone_each(case, labels, directory, say)
        if not apart:
            return [], missing
        stored = model if case.quantize == "none" else quantize_model(model, case.quantize)
        first, times = _turns(case, stored, directory, list(apart), repeats)
    rows = [_row(case, label, model.config, (apart, first, times), rate) for label in apart]
    for row in rows:
        of_peft = f", {row['step_ratio']:.3f} x PEFT" if "step_ratio" in row else ""
        say(f"{case}  {row['label']}: {row['step_ms']:.0f} ms{of_peft}")
    return rows, missing


Timed = dict[str, tuple[float, float]]


def _alone_each(
    case: Case, labels: Sequence[str], directory: Path, say: Callable[[str], None]
) -> tuple[Timed, list[str]]:
    """(label -> `alone`, why others could not be measured), before this process holds a step.

    Some need more memory than others, and PEFT quantises with bitsandbytes, which may be absent:
    where one fails, the others are measured all the same.
    """
    apart: Timed = {}
    failed = []
    for label in labels:
        try:
            apart[label] = alone(case, label, str(directory))
        except RuntimeError as error:
            failed.append(f"{case}: {first_line(error)}")
            say(failed[-1])
    return apart, failed


def _turns(
    case: Case, model: Model, directory: Path, labels: Sequence[str], repeats: int
) -> tuple[Timed, dict[str, list[float]]]:
    """(label -> (loss, seconds) of its first step, label -> milliseconds of a step per turn)."""
    steps = {
        label: (
            peft.train_step(case, directory, baselines.device())
            if label == PEFT
            else our_step(case, model, label)
        )
        for label in labels
    }
    first: Timed = {}
    for label in labels:
        start = time.perf_counter()
        first[label] = (steps[label](), time.perf_counter() - start)
    # bitsandbytes rounds otherwise than this project.
    same = [label for label in labels if label != PEFT or case.quantize == "none"]
    losses = [first[label][0] for label in same]
    tolerance = 1e-3 if case.dtype == "float32" else 5e-2
    if not np.ptp(losses) <= tolerance * np.max(losses):  # NaN does not agree
        raise ValueError(f"the first losses differ: {dict(zip(same, losses, strict=True))}")
    times: dict[str, list[float]] = {label: [] for label in labels}
    for label in turns(labels, repeats):
        start = time.perf_counter()
        steps[label]()
        times[label].append(1e3 * (time.perf_counter() - start))
    del steps
    gc.collect()
    return first, times


def _row(
    case: Case,
    label: str,
    config: LlamaConfig,
    measured: tuple[Timed, Timed, dict[str, list[float]]],
    rate: float,
) -> TableRow:
    """The row of one label. measured: as `_alone_each` and `_turns` return them; rate: FLOP/s."""
    apart, first, times = measured
    row: TableRow = {"case": case, "label": label} | summary(times[label], "step_ms")
    if PEFT in apart:
        row["step_ratio"] = ratio(times[label], times[PEFT])
        row["memory_ratio"] = apart[label][0] / apart[PEFT][0]
    row["tokens_per_s"] = 1e3 * case.batch * case.length / row["step_ms"]
    row["compile_s"] = first[label][1] - row["step_ms"] / 1e3
    row["loss"] = first[label][0]
    row["peak_bytes"], row["first_step_s"] = apart[label]
    flops = (6 if label == "full" else 4) * count_base(config) * row["tokens_per_s"]
    row["flops_share"] = flops / rate
    adapter = AdapterConfig("lora" if label == PEFT else label, rank=case.rank)
    return row | {"trainable": count_params(config, adapter)}


def page(result: Mapping[str, Any], title: str) -> str:
    """The page in Markdown.

    Args:
      result: of `measure`, with "environment" added.
      title: its heading.
    """
    env, shown = result["environment"], [_line(row) for row in result["rows"]]
    rates = ", ".join(
        f"{rate / 1e12:.2f} TFLOP/s in {dtype}" for dtype, rate in result["matmul_flops"].items()
    )
    lines = [
        f"# {title}",
        "",
        f"{result['rows'][0]['case'].model}. One training step (forward, backward, clip, AdamW) on"
        f" the same weights, tokens and mask; medians of {result['repeats']} turns [minimum,"
        " maximum], all rows of a case interleaved in one process.",
        "",
        '- "x PEFT": the median over turns of the ratio within a turn.',
        '- "masked": the share of positions, from the start, that the loss leaves out.',
        '- "FLOP share": 4 N FLOPs per token (6 N for full) over the measured matmul rate,'
        f" {rates}.",
        '- "peak": resident memory (on a GPU: device memory) of a process that loads the model and'
        ' trains three steps. "first step after": seconds from loading to the end of its first'
        " step, without a compile cache.",
        *(f"Not measured: {why}" for why in result["failed"]),
        "",
        markdown_table(shown, list(shown[0])),
        "",
        origin_line(env),
        "",
    ]
    return "\n".join(lines)


def _line(row: TableRow) -> TableRow:
    """A row of the table, as text."""
    case = row["case"]
    spread = f"[{row['step_ms_min']:.0f}, {row['step_ms_max']:.0f}]"
    return {
        "dtype": case.dtype,
        "base stored as": "numbers" if case.quantize == "none" else case.quantize,
        "batch": f"{case.batch} x {case.length}",
        "rank": case.rank,
        "masked": f"{case.masked:.0%}",
        "": row["label"],
        "trainable": row["trainable"],
        "step, ms": f"{row['step_ms']:.0f} {spread}",
        "x PEFT": f"{row['step_ratio']:.3f}" if "step_ratio" in row else "-",
        "tokens/s": round(row["tokens_per_s"]),
        "FLOP share": f"{row['flops_share']:.2f}",
        "peak, MB": round(row["peak_bytes"] / 1e6),
        "x PEFT ": f"{row['memory_ratio']:.3f}" if "memory_ratio" in row else "-",
        "compile, s": f"{row['compile_s']:.1f}",
        "first step after, s": f"{row['first_step_s']:.1f}",
    }


def write(result: Mapping[str, Any], out: str | Path, title: str) -> None:
    """Write <out>.json, <out>.md and, with PEFT, <out>.png: step time over PEFT's.

    Args:
      result: of `measure`, with "environment" added.
      out: path without a suffix.
      title: of the page and the picture.
    """
    rows = [row | {"case": dataclasses.asdict(row["case"])} for row in result["rows"]]
    write_result(out, {**result, "rows": rows}, page(result, title))

    def bar(label: str, case: Case) -> str:
        stored = "" if case.quantize == "none" else f", {case.quantize}"
        return f"{label}, {case.batch} x {case.length}, {case.masked:.0%} masked{stored}"

    compared = [row for row in result["rows"] if "step_ratio" in row]
    if values := {bar(r["label"], r["case"]): r["step_ratio"] for r in compared}:
        bars(values, out, title, label="step time / PEFT's")
