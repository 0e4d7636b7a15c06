"""What a trained run can be exported as: a format is a row of `EXPORTERS`.

The command line reads the table, so what needs jax is imported where a format is written.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zflora_jax.core.adapter_config import METHODS, OF_BASE, AdapterConfig
from zflora_jax.core.fields import require
from zflora_jax.core.run_config import RunConfig

if TYPE_CHECKING:
    from zflora_jax.core.model import Model
    from zflora_jax.core.trees import Tree


@dataclass(frozen=True)
class TrainedRun:
    """A run whose weights have been loaded."""

    workdir: Path
    config: RunConfig
    model: Model
    """The base; an exporter may free its arrays."""
    adapters: Tree
    step: int
    """Training steps behind the adapters."""


@dataclass(frozen=True)
class Exporter:
    """An export format."""

    text: str
    """What it writes, for the help of the command line."""
    write: Callable[..., dict[str, Any]]
    """(out, run, **settings) -> report. settings: those of `export_run` that are listed below."""
    settings: tuple[str, ...] = ()
    check: Callable[..., None] = lambda out, **settings: None
    """(out, **settings): raises for what cannot be written, before the run is loaded."""


def write_fused(
    out: str | Path,
    run: TrainedRun,
    *,
    dtype: str | None = None,
    quant: str | None = None,
    eps_z: float | None = None,
) -> dict[str, Any]:
    """The fused model as a Hugging Face directory, and how far its logits are from the fused
    model's. Args and report: as in `export_run`. The base of `run` cannot be used afterwards: of
    base, fused model and export one is in memory at a time.
    """
    from zflora_jax.core.model import fingerprint
    from zflora_jax.hf.save import save_hf

    base, card = fingerprint(run.model), _card(run)

    def save(fused: Model) -> dict[str, Any]:
        settings = {"dtype": dtype, "quant": quant, "eps_z": eps_z}
        return save_hf(out, fused, base_fingerprint=base, card=card, **settings)  # type: ignore[arg-type]

    return _write_and_compare(out, run, save)


def check_hf(
    out: Path, *, dtype: str | None = None, quant: str | None = None, eps_z: float | None = None
) -> None:
    """ConfigError where `write_fused` would raise it for `quant`, or for `dtype` with it; and for
    an `out` that is the name of a file.
    """
    from zflora_jax.hf.compressed import check_quant

    check_directory(out)
    if quant is not None:
        check_quant(quant, dtype)


def check_directory(out: Path) -> None:
    """ConfigError where `out`, which is to be a directory, is named as a file of another format."""
    require(
        out.suffix != ".gguf",
        f"out={str(out)!r} is the name of a file, and a directory is to be written: add --format"
        " gguf (format='gguf'), or give the name of a directory.",
    )


def write_gguf(
    out: str | Path, run: TrainedRun, *, quant: str | None = None, eps_z: float | None = None
) -> dict[str, Any]:
    """The fused model as a GGUF file, and how far its logits are from the fused model's. Args and
    report: as in `export_run`. The base of `run` cannot be used afterwards.
    """
    from zflora_jax.hf.gguf.keep import require_blocks
    from zflora_jax.hf.gguf.types import KEEP
    from zflora_jax.hf.gguf.write import save_gguf

    if quant == KEEP:
        method = run.config.adapter.method
        require(
            METHODS[method].widens,
            f"quant 'keep' writes the base's blocks, and {method!r} changes them: export the"
            " adapter (format 'peft') and convert it with llama.cpp's convert_lora_to_gguf.py, or"
            " choose another quant, such as 'q8_0'.",
        )
        require_blocks(run.model)
    return _write_and_compare(
        out, run, lambda fused: save_gguf(out, fused, quant or "q8_0", eps_z=eps_z)
    )


def check_gguf(out: Path, *, quant: str | None = None, eps_z: float | None = None) -> None:
    """ConfigError or CheckpointError where `write_gguf` would raise it for `out` or `quant`."""
    from zflora_jax.hf.gguf.write import check_target

    check_target(out, quant or "q8_0")


def _write_and_compare(
    out: str | Path, run: TrainedRun, save: Callable[[Model], dict[str, Any]]
) -> dict[str, Any]:
    """Fuse, `save`, and measure the gap. The base's arrays are freed."""
    from zflora_jax.evaluation.export_gap import export_gap
    from zflora_jax.evaluation.gap_prompts import gap_prompts
    from zflora_jax.experiments.restore import fuse_trained
    from zflora_jax.parallel.distributed import from_process_0, on_main

    # Before anything is written, and of process 0, since other hosts may lack the data.
    prompts, origin = from_process_0(on_main(lambda: gap_prompts(run.config, run.model)))
    fused = fuse_trained(run.model, run.config.adapter, run.adapters)
    report = save(fused)
    return report | {"gap_prompts": origin} | export_gap(fused, out, prompts, donate=True)


def _card(run: TrainedRun) -> dict[str, Any]:
    """The figures that the model card of an export gives."""
    from zflora_jax.adapters.counts import count_params
    from zflora_jax.experiments.run_report import read_report

    config = run.config
    card = {
        "task": config.data.task,
        "steps": run.step,
        "trainable parameters": count_params(run.model.config, config.adapter),
    }
    report = read_report(run.workdir) or {}
    loss = report.get(f"{config.eval.split}_loss")
    if report.get("steps") == run.step and loss is not None:
        card[f"{config.eval.split} loss"] = loss
    return card


def write_peft(out: str | Path, run: TrainedRun) -> dict[str, Any]:
    """LoRA adapters as a PEFT directory. Args and report: as in `export_run`."""
    from zflora_jax.hf.peft import save_peft

    return save_peft(out, *_lora(run))


def _lora(run: TrainedRun) -> tuple[Model, AdapterConfig, Tree]:
    """The base as it was loaded, and LoRA adapters for it."""
    from zflora_jax.adapters.split_base import plain_lora, split_base
    from zflora_jax.experiments.base import load_base
    from zflora_jax.parallel.mesh import mesh_of

    adapter = run.config.adapter
    if adapter.init not in OF_BASE:
        return run.model, adapter, run.adapters
    model = load_base(run.config, mesh_of(run.model.params))
    _, start = split_base(model, adapter)
    assert start is not None
    return model, *plain_lora(adapter, run.adapters, start)


DEFAULT = "hf"
EXPORTERS = {
    "hf": Exporter("the fused model", write_fused, ("dtype", "quant", "eps_z"), check_hf),
    "gguf": Exporter(
        "the fused model as a file for llama.cpp", write_gguf, ("quant", "eps_z"), check_gguf
    ),
    "peft": Exporter("LoRA adapters beside their base", write_peft, check=check_directory),
}
