"""What int8 consumers make of an export, by the scale of the state (eps_z): simulated on the
tensors that the export stores.

Command: python benchmarks/export_int8.py --workdir runs/quickstart
(about 3 minutes on 2 CPU cores)
Writes results/export_int8.json and .md. The run's model is fused and written in stock form at
several eps_z. Every matrix, embedding included, is rounded to int8 with one scale per output
channel (per row of the embedding), and in a second column the inputs of the layers' kernels too,
with one scale per token. KL and top-1 are against the same model in float32, on the run's held-out
rows, prompts and answers.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from zflora_jax.adapters.fuse import unfuse
from zflora_jax.core import trees
from zflora_jax.core.model import Model
from zflora_jax.data.pipeline import eval_batches
from zflora_jax.experiments.restore import load_fused
from zflora_jax.experiments.setup import held_out
from zflora_jax.hf.keys import hf_table
from zflora_jax.hf.restore import load_stock
from zflora_jax.hf.save import save_hf
from zflora_jax.hf.state_scale import choose_eps_z, state_share
from zflora_jax.nn.layers import Dense
from zflora_jax.nn.llama import Llama
from zflora_jax.reporting.files import write_result
from zflora_jax.reporting.provenance import environment, origin_line
from zflora_jax.reporting.tables import markdown_table
from zflora_jax.training.workdir import read_config


def rounded(x: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """`x` in int8 with one symmetric scale along `axes`, as floats again."""
    step = jnp.maximum(jnp.max(jnp.abs(x), axis=axes, keepdims=True), 1e-30) / 127
    return jnp.round(x / step) * step


def int8_weights(model: Model) -> Model:
    """`model` with every matrix rounded, one scale per output channel."""
    in_axes = {place.leaf: place.in_axes or 0 for place in hf_table(model.config).values()}

    def visit(name: str, x: jax.Array) -> jax.Array:
        if name.endswith("scale"):
            return x
        first = int(name.startswith("layers/"))  # a stacked leaf's own axis of layers
        inputs = in_axes[name]
        return rounded(x, tuple(range(first, first + inputs)) if inputs else (1,))

    return Model(model.config, trees.map_with_names(visit, model.params))


def log_probs(model: Model, batch: dict[str, np.ndarray], activations: bool = False) -> np.ndarray:
    """log p [N, V] float32 of the next token at every real position; `activations`: inputs of the
    layers' kernels rounded to int8 per token.
    """

    def hook(call: Any, args: tuple[Any, ...], kwargs: Any, context: Any) -> Any:
        inside = (
            isinstance(context.module, Dense)
            and context.method_name == "__call__"
            and context.module.path[0].startswith("layers")
        )
        if activations and inside:
            x = args[0]
            args = (rounded(x, tuple(range(2, x.ndim))), *args[1:])
        return call(*args, **kwargs)

    @jax.jit
    def apply(params: trees.Tree, tokens: jax.Array, valid: jax.Array) -> jax.Array:
        with nn.intercept_methods(hook):
            logits: Any = Llama(model.config).apply({"params": params}, tokens, valid)
        return jax.nn.log_softmax(logits)

    real = batch["segments"] > 0
    return np.asarray(apply(model.params, batch["tokens"], real))[real]


def compared(found: np.ndarray, want: np.ndarray) -> dict[str, float]:
    kl = np.sum(np.exp(want) * (want - found), axis=-1, dtype=np.float64)
    return {"kl": float(kl.mean()), "top1": float((found.argmax(-1) == want.argmax(-1)).mean())}


def rows_of_the_table(
    fused: Model, base: Model, batch: dict[str, np.ndarray]
) -> list[dict[str, Any]]:
    """The base and the fused model at several scales of the state: KL and equal choices."""
    rows: list[dict[str, Any]] = []

    def add(name: str, eps: float | None, model: Model, want: np.ndarray) -> None:
        small = int8_weights(model)
        rows.append(
            {
                "model": name,
                "eps_z": eps,
                "float": compared(log_probs(model, batch), want),
                "int8 weights": compared(log_probs(small, batch), want),
                "int8 weights and activations": compared(
                    log_probs(small, batch, activations=True), want
                ),
            }
        )
        print(rows[-1], flush=True)

    scales = {
        "chosen for float32": choose_eps_z(fused, "float32"),
        "chosen for bfloat16": choose_eps_z(fused, "bfloat16"),
        "2^-4": 2.0**-4,
        "2^-10, as before it was chosen": 2.0**-10,
    }
    add("base", None, base, log_probs(base, batch))
    exact = log_probs(fused, batch)
    for name, eps in scales.items():
        with tempfile.TemporaryDirectory() as folder:
            save_hf(Path(folder, "export"), fused, eps_z=eps)
            add(f"fused, {name}", eps, load_stock(Path(folder, "export")), exact)
    return rows


def page(result: dict[str, Any]) -> str:
    def shown(cell: dict[str, float]) -> str:
        return f"{cell['kl']:.1e} ({100 * cell['top1']:.1f}%)"

    kinds = ("float", "int8 weights", "int8 weights and activations")
    table = [
        {
            "model": row["model"],
            "eps_z": "-" if row["eps_z"] is None else f"2^{int(np.log2(row['eps_z']))}",
        }
        | {kind: shown(row[kind]) for kind in kinds}
        for row in result["rows"]
    ]
    steps = result["run"].removeprefix("step")
    about = result.get("about", f"the run in `{result['config']['workdir']}`")
    return f"""# int8 by output channel and token: which scale of the state

SmolLM2-135M with a zFLoRA adapter: {about}, after {steps} steps. KL in nats (and how often the
likeliest token is the same) against the same model in float32, {result["positions"]} positions of
held-out rows. Simulated: rounded to int8 and back, computed in float32.

{markdown_table(table, list(table[0]))}

By the weights the state's energy is {result["state_share"]:.4f} of the base channels' (see
`zflora_jax/hf/state_scale.py`).

{origin_line(result["environment"])}
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--workdir",
        required=True,
        metavar="DIR",
        help="a trained run of zflora-minimal or zflora-uniform",
    )
    parser.add_argument("--rows", type=int, default=16, help="held-out rows (default: 16)")
    parser.add_argument("--out", default="results/export_int8")
    args = parser.parse_args()
    env, run = environment(), read_config(args.workdir)
    fused, label = load_fused(args.workdir)
    base, _ = unfuse(fused)
    encoded = held_out(run, fused)
    batch = next(iter(eval_batches(encoded, min(args.rows, len(encoded)), run.data.bucket_lengths)))
    result = {
        "rows": rows_of_the_table(fused, base, batch),
        "state_share": state_share(fused),
        "positions": int((batch["segments"] > 0).sum()),
        "config": vars(args),
        "environment": env,
        "run": label,
        "about": f"{run.model}, {run.adapter.method}, rank {run.adapter.rank}, {run.data.task},"
        f" seed {run.train.seed}",
    }
    write_result(args.out, result, page(result))
    print(page(result))


if __name__ == "__main__":
    main()
