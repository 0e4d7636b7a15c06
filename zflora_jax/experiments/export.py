"""Export formats, a row of `EXPORTERS` each, and the export of a trained run.

The command line reads the table, so modules that import jax are imported only to write a format.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zflora_jax.core.adapter_config import METHODS, OF_BASE
from zflora_jax.core.fields import require, require_in
from zflora_jax.core.run_config import RunConfig
from zflora_jax.core.storage import as_path

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from zflora_jax.core.model import Model
    from zflora_jax.core.trees import Tree


@dataclass(frozen=True)
class TrainedRun:
    """A run whose weights have been loaded."""

    workdir: Path
    config: RunConfig
    model: Model  # the base; an exporter may free its arrays
    adapters: Tree
    step: int  # training steps behind the adapters


@dataclass(frozen=True)
class Exporter:
    """An export format."""

    text: str  # for the help of the command line
    write: Callable[..., dict[str, Any]]  # (out, run, **settings) -> report
    settings: tuple[str, ...]  # those of `export_run` that it has
    check: Callable[..., None]  # (out, **settings), before the run is loaded; raises


def export_run(
    workdir: str | Path,
    out: str | Path,
    *,
    format: str = "hf",
    dtype: str | None = None,
    quant: str | None = None,
    checkpoint: int | str | None = None,
    eps_z: float | None = None,
    mesh: Mesh | None = None,
) -> dict[str, Any]:
    """Exports a trained run.

    Processes that share the model call this together, with an `out` that all of them can read;
    process 0 writes.

    Args:
      workdir: Directory or URL of the run.
      out: Directory to write; a file for "gguf" and "slices".
      format: A row of `EXPORTERS`: "hf", a fused Hugging Face directory; "gguf", the fused model as
        a file for llama.cpp; "peft", LoRA adapters as a directory; "slices", see `save_slices`.
      dtype: Data type of the "hf" weights, see `save_hf`; None: that of the run.
      quant: Type of the "gguf" weights, see `save_gguf` (None: "q8_0"), or of the "hf" kernels, see
        `save_hf` (None: floats).
      checkpoint: Number of the checkpoint, "best", or None for the newest, see `load_run`.
      eps_z: Scale of the stored residual state; None: chosen from the weights.
      mesh: Mesh of the model, see `load_run`.

    Returns:
      A report of the written files. For "hf" and "gguf" it compares them with the fused model in
      float32 on held-out or built-in texts ("gap_prompts"): max and mean |dlogit|, top-1 agreement.

    Raises:
      ConfigError: The checkpoint is missing, or the format cannot hold the run or a setting.
    """
    from zflora_jax.experiments.restore import load_run
    from zflora_jax.parallel.distributed import require_equal, require_shared

    target = as_path(out, "out")
    require_in(EXPORTERS, format, f"format={format!r}")
    exporter, given = EXPORTERS[format], {"dtype": dtype, "quant": quant, "eps_z": eps_z}
    for name, value in given.items():
        formats = [other for other, row in EXPORTERS.items() if name in row.settings]
        require(
            value is None or format in formats,
            f"--{name.removesuffix('_z')} goes with --format {' or '.join(formats)}: {format} does"
            " not have it.",
        )
    settings = {name: given[name] for name in exporter.settings}
    exporter.check(target, **settings)
    require_equal({"format": format, "checkpoint": checkpoint, **given})
    require_shared(target.expanduser().absolute().parent, "the directory of out,")
    run = TrainedRun(as_path(workdir, "workdir"), *load_run(workdir, checkpoint, mesh=mesh))
    require(
        as_path(base := run.config.model, "model").expanduser().resolve()
        != target.expanduser().resolve(),
        f"out={str(target)!r} is the model that this run was trained on (model={base!r}), and the"
        " run needs it. Choose another path.",
    )
    return exporter.write(out, run, **settings)


def check_directory(out: Path) -> None:
    """Raises ConfigError for a file name as `out`."""
    require(
        out.suffix != ".gguf",
        f"out={str(out)!r} is the name of a file, and this format is a directory: add --format"
        " gguf (format='gguf'), or give the name of a directory.",
    )


def check_hf(out: Path, *, quant: str | None = None, dtype: str | None = None, **_: Any) -> None:
    """Raises ConfigError for a file name as `out`, a directory that must not be replaced, and a
    `quant` that does not exist or contradicts `dtype`.
    """
    from zflora_jax.hf.compressed import check_quant
    from zflora_jax.hf.save import require_replaceable

    check_directory(out)
    require_replaceable(out)
    if quant is not None:
        check_quant(quant, dtype)


def write_hf(out: str | Path, run: TrainedRun, **settings: Any) -> dict[str, Any]:
    """Writes the fused model as a Hugging Face directory. Memory holds one of base, fused model and
    export at a time, so the base of `run` cannot be used afterwards.
    """
    from zflora_jax.adapters.widths import count_params
    from zflora_jax.core.model import fingerprint
    from zflora_jax.experiments.run_report import read_report
    from zflora_jax.hf.save import save_hf

    config, report = run.config, read_report(run.workdir) or {}
    card = {
        "task": config.data.task,
        "steps": run.step,
        "trainable parameters": count_params(run.model.config, config.adapter),
    }
    loss = report.get(f"{config.eval.split}_loss")
    if report.get("steps") == run.step and loss is not None:
        card[f"{config.eval.split} loss"] = loss
    settings |= {"base_fingerprint": fingerprint(run.model), "card": card}
    return _write_and_compare(out, run, lambda fused: save_hf(out, fused, **settings))


def check_gguf(out: Path, *, quant: str | None = None, **_: Any) -> None:
    """Raises ConfigError for an `out` or `quant` that cannot be written."""
    from zflora_jax.hf.gguf.write import gguf_target

    gguf_target(out, quant or "q8_0")


def write_gguf(
    out: str | Path, run: TrainedRun, *, quant: str | None, eps_z: float | None
) -> dict[str, Any]:
    """Writes the fused model as a GGUF file. The base of `run` cannot be used afterwards."""
    from zflora_jax.hf.gguf.file import KEEP
    from zflora_jax.hf.gguf.write import save_gguf

    method = run.config.adapter.method
    require(
        quant != KEEP or METHODS[method].keeps_codes,
        f"quant 'keep' writes the base's blocks, and {method!r} changes them: export the adapter"
        " (format 'peft') and convert it with llama.cpp's convert_lora_to_gguf.py, or choose"
        " another quant, such as 'q8_0'.",
    )
    quant = quant or "q8_0"
    return _write_and_compare(out, run, lambda fused: save_gguf(out, fused, quant, eps_z=eps_z))


def check_slices(out: Path, **_: Any) -> None:
    """Raises ConfigError for an `out` with another suffix."""
    from zflora_jax.hf.slices import slices_target

    slices_target(out)


def write_slices(
    out: str | Path, run: TrainedRun, *, dtype: str | None, eps_z: float | None
) -> dict[str, Any]:
    """Writes the slices that the adapter adds to the kernels of an export."""
    from zflora_jax.experiments.restore import fuse_trained
    from zflora_jax.hf.slices import save_slices

    fused = fuse_trained(run.model, run.config.adapter, run.adapters)
    return save_slices(out, fused, dtype=dtype, eps_z=eps_z)


def write_peft(out: str | Path, run: TrainedRun) -> dict[str, Any]:
    """Writes LoRA adapters as a PEFT directory."""
    from zflora_jax.adapters.init import plain_lora, split_base
    from zflora_jax.experiments.base import load_base
    from zflora_jax.hf.peft import save_peft
    from zflora_jax.parallel.mesh import mesh_of

    model, adapter, adapters = run.model, run.config.adapter, run.adapters
    if adapter.init in OF_BASE:  # trained with the rest of the base; PEFT uses the whole base
        model = load_base(run.config, mesh_of(run.model.params))
        _, start = split_base(model, adapter)
        assert start is not None
        adapter, adapters = plain_lora(adapter, adapters, start)
    return save_peft(out, model, adapter, adapters)


def _write_and_compare(
    out: str | Path, run: TrainedRun, save: Callable[[Model], dict[str, Any]]
) -> dict[str, Any]:
    """Fuses, saves, and measures the distance of the logits. The base's arrays are freed."""
    from zflora_jax.evaluation.export_gap import export_gap, gap_prompts
    from zflora_jax.experiments.restore import fuse_trained
    from zflora_jax.parallel.distributed import from_process_0, on_main

    # Before anything is written; process 0 reads them, since other hosts may lack the data.
    prompts, origin = from_process_0(on_main(lambda: gap_prompts(run.config, run.model)))
    fused = fuse_trained(run.model, run.config.adapter, run.adapters)
    report = save(fused)
    return report | {"gap_prompts": origin} | export_gap(fused, out, prompts, donate=True)


EXPORTERS = {
    "hf": Exporter("the fused model", write_hf, ("dtype", "quant", "eps_z"), check_hf),
    "gguf": Exporter(
        "the same as a file for llama.cpp", write_gguf, ("quant", "eps_z"), check_gguf
    ),
    "peft": Exporter("LoRA adapters without their base", write_peft, (), check_directory),
    "slices": Exporter("a task for a server", write_slices, ("dtype", "eps_z"), check_slices),
}
DEFAULT = "hf"
