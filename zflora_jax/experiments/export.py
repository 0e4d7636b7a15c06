"""Export what a run has trained, and say how far the export is from the trained model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from zflora_jax.core.fields import nearest, require
from zflora_jax.core.storage import as_path
from zflora_jax.experiments.exporters import DEFAULT, EXPORTERS, TrainedRun
from zflora_jax.experiments.restore import load_run
from zflora_jax.parallel.distributed import require_shared


def export_run(
    workdir: str | Path,
    out: str | Path,
    *,
    format: str = DEFAULT,
    dtype: str | None = None,
    quant: str | None = None,
    checkpoint: int | str | None = None,
    eps_z: float | None = None,
    mesh: Mesh | None = None,
) -> dict[str, Any]:
    """Export what a run has trained.

    Processes that share the model call this together, with an `out` that all of them can read;
    process 0 writes.

    Args:
      workdir: of the run.
      out: directory to write; of "gguf" a file.
      format: a row of `EXPORTERS`: "hf", a fused Hugging Face directory; "gguf", the fused model as
        a file for llama.cpp; "peft", LoRA adapters as a directory.
      dtype: of the "hf" weights, as `save_hf` takes it; None for that of the run.
      quant: of the "gguf" weights, as `save_gguf` takes it, None: "q8_0"; of the "hf" kernels,
        as `save_hf` takes it, None: as numbers.
      checkpoint: which one, as the step of `load_run`.
      eps_z: scale of the residual state in "hf" and "gguf", as `save_hf` and `save_gguf` take it;
        None: as they choose.
      mesh: as in `load_run`.

    Returns:
      A report of what was written. For "hf" and "gguf" it says how far the export's
      logits are from those of the fused model in float32: max and mean |dlogit|, and top-1
      agreement, on the prompts of held-out rows, or on built-in texts if the data is gone
      ("gap_prompts" says which).

    Raises:
      ConfigError: there is no such checkpoint, it cannot be exported like this, or a setting is
        given that the format does not have.
    """
    target = as_path(out, "out")
    require(format in EXPORTERS, f"format={format!r}: {nearest(format, EXPORTERS)}.")
    exporter = EXPORTERS[format]
    given = {"dtype": dtype, "quant": quant, "eps_z": eps_z}
    _require_taken(format, given)
    settings = {name: value for name, value in given.items() if name in exporter.settings}
    exporter.check(target, **settings)
    require_shared(target.expanduser().absolute().parent, "the directory of out,")
    run = TrainedRun(as_path(workdir, "workdir"), *load_run(workdir, checkpoint, mesh=mesh))
    _refuse_base(target, run.config.model)
    return exporter.write(out, run, **settings)


def _refuse_base(target: Path, model: str) -> None:
    """Refuse to write over what a run was trained on, which `save_hf` or `save_gguf` may have made:
    without it the run is of no use.
    """
    there = as_path(model, "model")
    require(
        there.expanduser().resolve() != target.expanduser().resolve(),
        f"out={str(target)!r} is the model that this run was trained on (model={model!r}), and the"
        " run needs it. Choose another path.",
    )


def _require_taken(format: str, given: Mapping[str, Any]) -> None:
    """Refuse settings that `format` does not have."""
    options = {"dtype": "--dtype", "quant": "--quant", "eps_z": "--eps"}
    for name, option in options.items():
        taken_by = [other for other, exporter in EXPORTERS.items() if name in exporter.settings]
        require(
            given[name] is None or format in taken_by,
            f"{option} goes with --format {' or '.join(taken_by)}: {format} does not have it.",
        )
