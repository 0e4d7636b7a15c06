"""The files that benchmarks/on_device.py and tools/check_litert.py give to runtimes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

LITERT = {"litert f32": "f32", "litert int8": "int8"}  # type -> quant
BASE, BESIDE, MERGED = "base", "LoRA un-merged", "LoRA merged"
FUSED = ("zflora-minimal", "zflora-uniform")
LABELS = (BASE, BESIDE, MERGED, *FUSED)
RANK = 16


def models(kept: bool) -> Iterator[tuple[str, Any]]:
    """(label, model) of every file, one after the other in memory; kept: with the packaged file's
    blocks where a method leaves them alone.
    """
    import zflora_jax as zf

    for label in (BASE, MERGED, *FUSED):
        codes = "keep" if kept and label != MERGED else None
        model = zf.load_model("smollm2-135m", quantize=codes)
        if label == BASE:
            yield label, model
            continue
        adapter = zf.AdapterConfig("lora" if label == MERGED else label, rank=RANK)
        yield label, zf.fuse(model, adapter, moved(model, adapter), donate=True)


def moved(model: Any, adapter: Any) -> Any:
    """Adapters that differ from zero everywhere."""
    import jax

    import zflora_jax as zf

    leaves, tree = jax.tree.flatten(zf.init_adapters(jax.random.key(1), model, adapter))
    keys = jax.random.split(jax.random.key(2), len(leaves))
    noisy = [x + 0.01 * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)]
    return tree.unflatten(noisy)


def write_files(folder: Path, kind: str) -> dict[str, dict[str, Any]]:
    """label -> the worker's job; the files of one type, and the LoRA beside the base."""
    import zflora_jax as zf
    from zflora_jax.hf.gguf_lora import save_gguf_lora

    jobs: dict[str, dict[str, Any]] = {}
    for label, model in models(kept=kind == "q4_1"):
        file = folder / f"{label.replace(' ', '-')}-{kind}.gguf"
        quant = "keep" if kind == "q4_1" and label != MERGED else kind
        zf.save_gguf(file, model, quant)
        jobs[label] = {"gguf": str(file), "lora": None}
        if label == BASE:
            lora = folder / "lora.gguf"
            adapter = zf.AdapterConfig("lora", rank=RANK)
            save_gguf_lora(lora, model, adapter, moved(model, adapter))
            jobs[BESIDE] = {"gguf": str(file), "lora": str(lora)}
    return {label: jobs[label] for label in LABELS}


def write_litert(folder: Path, kind: str, python: str, longest: int) -> dict[str, dict[str, Any]]:
    """label -> the worker's job; LiteRT's files of one type, none with LoRA beside the base."""
    import zflora_jax as zf

    jobs: dict[str, dict[str, Any]] = {}
    for label, model in models(kept=False):
        file = folder / f"{label.replace(' ', '-')}.tflite"
        zf.save_litert(file, model, LITERT[kind], context=longest, python=python)
        jobs[label] = {"litert": str(file)}
    return jobs


def size(job: dict[str, Any]) -> int:
    """The bytes of a contender's files."""
    return sum(os.path.getsize(path) for path in job.values() if path is not None)
