"""Time and memory of one training step: ours and PEFT's, from the same weights, batch, mask, dtype and optimizer settings."""

from __future__ import annotations

import dataclasses
import multiprocessing
import re
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from zflora_jax.adapters.init import init_adapters
from zflora_jax.adapters.methods import count_base, count_params
from zflora_jax.bench import peers
from zflora_jax.bench.timing import ratio, summary
from zflora_jax.config import METHODS, PRESETS, AdapterConfig, OptimConfig, preset
from zflora_jax.fields import require
from zflora_jax.hf.load import load_model
from zflora_jax.hf.save import save_hf
from zflora_jax.llama import random_model
from zflora_jax.model import Model
from zflora_jax.plots import bars
from zflora_jax.report import atomic_write, markdown_table, write_json
from zflora_jax.trainer import init_state, make_train_step

Row = dict[str, Any]
PEFT = "PEFT lora"
OPTIM = OptimConfig(schedule="constant", warmup_steps=0, learning_rate=1e-3)


@dataclass(frozen=True)
class Case:
    """One training set-up. model: a preset (random weights) or what load_model takes. masked: share of positions, from the start, without loss."""

    model: str
    dtype: str = "float32"
    rank: int = 16
    batch: int = 8
    length: int = 128
    masked: float = 0.0

    def __post_init__(self) -> None:
        for name in ("rank", "batch", "length"):
            require(getattr(self, name) >= 1, f"{name}={getattr(self, name)}: must be at least 1.")
        require(0 <= self.masked < 1, f"masked={self.masked}: a share of the positions, at least 0 and below 1.")

    def batch_arrays(self, vocab_size: int) -> dict[str, np.ndarray]:
        """tokens int32, loss_mask bool, segments int32, each [batch, length]; one token of every sequence at least is to be predicted."""
        tokens = np.random.default_rng(0).integers(0, vocab_size, (self.batch, self.length)).astype(np.int32)
        mask = np.broadcast_to(np.arange(self.length) >= max(1, round(self.masked * self.length)), tokens.shape)
        return {"tokens": tokens, "loss_mask": mask, "segments": np.ones_like(tokens)}


def load(case: Case) -> Model:
    """The base model of `case`, in its dtype."""
    if case.model not in PRESETS or case.model == "smollm2-135m":
        return load_model(case.model, dtype=case.dtype)
    model = random_model(preset(case.model).replace(dtype=case.dtype), jax.random.key(0))
    return Model(model.config, jax.tree.map(lambda leaf: leaf.astype(case.dtype), model.params))


def our_step(case: Case, model: Model, method: str) -> Callable[[], float]:
    """A function that trains one step and returns its loss."""
    adapter = AdapterConfig(method, rank=case.rank)
    state = init_state(init_adapters(jax.random.key(0), model, adapter), OPTIM, 1000)
    step = make_train_step(model.config, adapter, OPTIM, 1000)
    batch = jax.device_put(case.batch_arrays(model.config.vocab_size))

    def run() -> float:
        nonlocal state
        state, metrics = step(model.params, state, batch)
        return float(metrics["loss"])

    return run


def peft_step(case: Case, directory: Path) -> Callable[[], float]:
    """The same with PEFT's LoRA on the model saved in `directory`: AdamW and the clip of the global norm as ours, no gradient checkpointing."""
    torch, transformers, _ = peers.imports()
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=getattr(torch, case.dtype))
    model = peers.with_lora(model.to(peers.device()), case.rank).train()
    arrays = case.batch_arrays(model.config.vocab_size)
    tokens = torch.tensor(arrays["tokens"], dtype=torch.long, device=model.device)
    labels = tokens.masked_fill(torch.tensor(~arrays["loss_mask"], device=model.device), -100)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=OPTIM.learning_rate, betas=(OPTIM.b1, OPTIM.b2), eps=OPTIM.eps, weight_decay=0.0)

    def run() -> float:
        loss = model(input_ids=tokens, attention_mask=torch.ones_like(tokens), labels=labels, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, OPTIM.clip_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    return run


def _peak(case: Case, method: str, directory: str, steps: int) -> tuple[float, float]:
    """(peak resident memory of this process in bytes, seconds from nothing to the first finished step), for a process of its own."""
    if method == PEFT:
        peers.imports()  # ours are imported by now too
    started = time.perf_counter()
    run = peft_step(case, Path(directory)) if method == PEFT else our_step(case, load_model(directory, dtype=case.dtype), method)
    run()
    first = time.perf_counter() - started
    for _ in range(steps - 1):
        run()
    peak = _peak_resident()
    if jax.default_backend() == "gpu":  # what counts there is the device's memory
        if method == PEFT:
            peak = peers.imports()[0].cuda.max_memory_allocated()
        else:
            peak = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use", peak)
    return peak, first


def _peak_resident() -> float:
    """Peak resident memory of this process, bytes. Linux's ru_maxrss would count the parent it was forked from."""
    status = Path("/proc/self/status")
    if status.is_file() and (found := re.search(r"VmHWM:\s*(\d+) kB", status.read_text())):
        return 1024 * int(found[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def matmul_rate(dtype: str, size: int = 4096, repeats: int = 5) -> float:
    """FLOP/s that a product of two square matrices reaches at best on the default device."""
    x, product, best = jnp.ones((size, size), jnp.dtype(dtype)), jax.jit(lambda a: a @ a), 0.0
    jax.block_until_ready(product(x))
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(product(x))
        best = max(best, 2 * size**3 / (time.perf_counter() - start))
    return best


def measure(
    cases: Sequence[Case], methods: Sequence[str], *, repeats: int = 5, with_peft: bool = True, say: Callable[[str], None] = print
) -> dict[str, Any]:
    """A row per case and label: step_ms (median over turns, _min, _max), its ratio to PEFT's within a turn, tokens_per_s, flops_share,
    compile_s (first step less a later one), peak_bytes and first_step_s (each of a process of its own), loss of the first step.

    flops_share: 4 N per token (forward, and backward through the frozen base: no gradient of a base kernel) over the device's measured matmul rate;
    6 N for method "full". ValueError if the labels' first losses differ: they would not do the same work.
    """
    unknown = [m for m in methods if m not in METHODS]
    require(len(methods) > 0 and not unknown, f"methods={list(methods)}: choose from {', '.join(METHODS)}.")
    require(repeats >= 1, f"repeats={repeats}: must be at least 1.")
    rates = {dtype: matmul_rate(dtype) for dtype in dict.fromkeys(case.dtype for case in cases)}
    rows: list[Row] = []
    for case in cases:
        model = load(case)
        config = model.config
        require(case.length <= config.max_position_embeddings, f"length={case.length} exceeds the context of {config.max_position_embeddings}.")
        with tempfile.TemporaryDirectory() as folder:
            directory = Path(folder) / "base"
            save_hf(directory, model)
            labels = [*methods, *([PEFT] if with_peft else [])]
            steps = {label: peft_step(case, directory) if label == PEFT else our_step(case, model, label) for label in labels}
            first: dict[str, tuple[float, float]] = {}
            for label, step in steps.items():
                start = time.perf_counter()
                first[label] = (step(), time.perf_counter() - start)
            losses = [loss for loss, _ in first.values()]
            if max(losses) - min(losses) > (1e-3 if case.dtype == "float32" else 5e-2) * max(losses):
                raise ValueError(f"the first losses differ: {dict(zip(labels, losses, strict=True))}")
            times: dict[str, list[float]] = {label: [] for label in labels}
            for turn in range(repeats):
                for label in labels[:: 1 if turn % 2 == 0 else -1]:
                    start = time.perf_counter()
                    steps[label]()
                    times[label].append(1e3 * (time.perf_counter() - start))
            del steps, model
            with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
                alone = {label: pool.apply(_peak, (case, label, str(directory), 3)) for label in labels}
        for label in labels:
            row: Row = {"case": case, "label": label} | summary(times[label], "step_ms")
            if with_peft:
                row["step_ratio"] = ratio(times[label], times[PEFT])
                row["memory_ratio"] = alone[label][0] / alone[PEFT][0]
            tokens = case.batch * case.length
            row |= {"tokens_per_s": 1e3 * tokens / row["step_ms"], "compile_s": first[label][1] - row["step_ms"] / 1e3, "loss": first[label][0]}
            row |= {"peak_bytes": alone[label][0], "first_step_s": alone[label][1]}
            row["flops_share"] = (6 if label == "full" else 4) * count_base(config) * row["tokens_per_s"] / rates[case.dtype]
            adapter = AdapterConfig("lora" if label == PEFT else label, rank=case.rank)
            row["trainable"] = count_params(config, adapter)
            rows.append(row)
            say(f"{case}  {label}: {row['step_ms']:.0f} ms, {row.get('step_ratio', float('nan')):.3f} x PEFT")
    return {"matmul_flops": rates, "repeats": repeats, "rows": rows}


def page(result: Mapping[str, Any], title: str) -> str:
    """The table as Markdown. result: of `measure`, with "environment"."""
    env, shown = result["environment"], []
    for row in result["rows"]:
        case = row["case"]
        line: Row = {
            "dtype": case.dtype,
            "batch": f"{case.batch} x {case.length}",
            "rank": case.rank,
            "masked": f"{case.masked:.0%}",
            "": row["label"],
        }
        line |= {"trainable": row["trainable"], "step, ms": f"{row['step_ms']:.0f} [{row['step_ms_min']:.0f}, {row['step_ms_max']:.0f}]"}
        line |= {"x PEFT": f"{row['step_ratio']:.3f}" if "step_ratio" in row else "-", "tokens/s": round(row["tokens_per_s"])}
        line |= {"FLOP share": f"{row['flops_share']:.2f}", "peak, MB": round(row["peak_bytes"] / 1e6)}
        line |= {"x PEFT ": f"{row['memory_ratio']:.3f}" if "memory_ratio" in row else "-"}
        line |= {"compile, s": f"{row['compile_s']:.1f}", "first step after, s": f"{row['first_step_s']:.1f}"}
        shown.append(line)
    rates = ", ".join(f"{rate / 1e12:.2f} TFLOP/s in {dtype}" for dtype, rate in result["matmul_flops"].items())
    lines = [
        f"# {title}",
        "",
        f"{result['rows'][0]['case'].model}. One training step (forward, backward, clip, AdamW) on the same weights, tokens and mask; medians of "
        f"{result['repeats']} turns [least, most], all labels of a case by turns in one process. x PEFT: median over turns of ratios within a turn.",
        "masked: share of positions, from the start, that the loss leaves out. FLOP share: 4 N FLOPs per token (6 N for full) over the measured "
        f"matmul rate, {rates}. peak: resident memory (on a GPU: device memory) of a process that loads the model and trains three steps; "
        "first step after: seconds from loading to the end of its first step, no compile cache.",
        "",
        markdown_table(shown, list(shown[0])),
        "",
        f"Command: `{env['command']}`; commit {env['commit']}; device {env['device']} ({env['cpu_count']} CPUs); jax {env['jax']}; {env['date']}.",
        "",
    ]
    return "\n".join(lines)


def write(result: Mapping[str, Any], out: str | Path, title: str) -> None:
    """<out>.json, <out>.md, and with PEFT <out>.png: step time over PEFT's, a bar per case and label."""
    if "step_ratio" in result["rows"][0]:
        values = {f"{r['label']}, {r['case'].batch} x {r['case'].length}, {r['case'].masked:.0%} masked": r["step_ratio"] for r in result["rows"]}
        bars(values, f"{out}.png", title, label="step time / PEFT's")
    write_json(f"{out}.json", {**result, "rows": [row | {"case": dataclasses.asdict(row["case"])} for row in result["rows"]]})
    atomic_write(f"{out}.md", page(result, title).encode())
