"""The token loop compiled for devices that are absent: kernels, copies, memory, estimated cycles.

Nothing runs. Shapes alone are compiled (`parallel.targets`), and the compiled text is read
(`parallel.program_text`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from zflora_jax.bench.contenders import BASE, FUSED, UNMERGED, read_bytes
from zflora_jax.bench.decode_case import DTYPE, DecodeCase as DecodeCase
from zflora_jax.core import trees
from zflora_jax.core.adapter_config import METHODS, AdapterConfig
from zflora_jax.core.fields import require
from zflora_jax.core.presets import preset
from zflora_jax.nn.kv_cache import cache_slots, init_cache
from zflora_jax.parallel.program_text import Program, async_bytes, kernels
from zflora_jax.parallel.targets import GIB, Target, target
from zflora_jax.reporting.files import write_result
from zflora_jax.reporting.plots import grouped_bars
from zflora_jax.reporting.provenance import origin_line
from zflora_jax.reporting.tables import markdown_table

TableRow = dict[str, Any]


def loop_row(case: DecodeCase, where: Target) -> TableRow:
    """Compile a case and read its token loop.

    Returns:
      kernels: operations of a token that run a kernel (on a TPU, a bundle of instructions).
      copies: those of them that write a whole kernel, table or cache anew.
      call_copies: the same of the rest of the program, which runs once a call: prefill, and the way
        from it to the loop.
      arguments, temporaries: bytes, as the compiler plans them for the whole program.
      read_bytes: that a token has to read, at a half-filled cache.
      cycles, async_bytes: of a TPU, the compiler's estimate of a token, and bytes of the copies
        that it starts ahead, which the estimate leaves out.
      floor_share: of a TPU, those cycles, with the bytes at the published bandwidth, over the time
        to read read_bytes.
      prefill_cycles, prefill_share: of a TPU, the same of what runs before and after the loop, over
        the time to read the layers or, if that is longer, to multiply the prompts by them at the
        published rate, and to read the head.
    """
    compiled, variables = case.compile(where), case.variables(where)
    program, memory, chip = Program(compiled.as_text()), compiled.memory_analysis(), where.chip
    loop = program.loop("decode_until)/while")
    config = case.packed(where)
    slots = cache_slots(case.prompt + case.new_tokens)
    cache = jax.eval_shape(lambda: init_cache(config, case.batch, slots, case.beside))
    # Of codes the shape of the numbers: a kernel that is dequantised has it.
    leaves = trees.flatten(variables["params"]).values()
    matrices = [x.shape for x in leaves if len(x.shape) > 1]
    in_loop = {op.name for op in loop}
    rest = [(op, times) for op, times in program.runs() if op.name not in in_loop]
    once = [op for op, _ in rest]
    caches = [x.shape for x in jax.tree.leaves(cache.layers)]
    row: TableRow = {
        "kernels": len(kernels(loop)),
        "copies": len(program.whole_copies(loop, matrices, caches)),
        "call_copies": len(program.whole_copies(once, [], [*matrices, *caches])),
        "arguments": int(memory.argument_size_in_bytes),
        "temporaries": int(memory.temp_size_in_bytes),
        "read_bytes": read_bytes(variables, config, case.batch, case.prompt + case.new_tokens // 2),
    }
    if chip.clock:
        row["cycles"] = sum(op.cycles for op in kernels(loop))
        row["async_bytes"] = async_bytes(loop)
        per_byte = chip.clock / chip.bandwidth
        spent = row["cycles"] + row["async_bytes"] * per_byte
        row["floor_share"] = spent / (row["read_bytes"] * per_byte)
        row["prefill_cycles"] = sum(times * op.cycles for op, times in rest if kernels([op]))
        layers = [x for name, x in variables["params"].items() if name.startswith("layers_")]
        numbers = sum(x.size for x in jax.tree.leaves(layers))
        operations = 2 * numbers * case.batch * case.prompt
        head = read_bytes(variables, config, case.batch, 0) - 2 * numbers  # for the last position
        least = max(2 * numbers / chip.bandwidth, operations / chip.flops) + head / chip.bandwidth
        row["prefill_share"] = (row["prefill_cycles"] + async_bytes(once) * per_byte) / (
            least * chip.clock
        )
    return row


def measure(
    targets: Sequence[str],
    models: Sequence[str],
    *,
    methods: Sequence[str] = FUSED,
    ranks: Sequence[int] = (8, 16, 32, 64, 128),
    batches: Sequence[int] = (1, 8),
    layers: int = 4,
    say: Callable[[str], None] = print,
) -> list[TableRow]:
    """Compile the table: for each target, model and batch the base, LoRA beside it at the first
    rank, and each method that widens, fused, at every rank.

    A merge by addition (lora, ffa) has the base's program, and an enabled adapter of zeros that of
    its method; they have no rows of their own.

    Args:
      targets: names of `parallel.targets.target`.
      models: presets.
      methods: those of them that widen are compiled.
      ranks: of the adapters.
      batches: rows.
      layers: how many are compiled, 0 for all.
      say: called with a line after each program.

    Raises:
      ConfigError: an unknown name, a value out of range, or a compiler that is not installed.
    """
    places = [target(name) for name in targets]
    require(layers >= 0, f"layers={layers}: must be at least 1, or 0 for all of a model's.")
    for name, values in (("ranks", ranks), ("batches", batches)):
        require(
            len(values) > 0 and min(values) >= 1,
            f"{name}={list(values)}: give at least one, each at least 1.",
        )
    unknown = [m for m in methods if m not in FUSED]
    require(not unknown, f"methods {unknown} cannot be fused here; choose from {', '.join(FUSED)}.")
    rows, found = list[TableRow](), dict[Any, TableRow]()
    for where in places:
        for model in models:
            config = preset(model)
            config = config.replace(num_layers=layers) if layers else config
            for batch in batches:
                for label, adapter in _contenders(methods, ranks):
                    row = {"target": where.name, "model": model, "layers": config.num_layers}
                    row |= {"batch": batch, "label": label}
                    row |= {"rank": adapter.rank if adapter else None}
                    case = DecodeCase(config, adapter, batch)
                    # Ranks that are filled up to the same widths have the same program.
                    program = where, case.packed(where).stored, case.beside, batch
                    if program not in found:
                        found[program] = loop_row(case, where)
                    rows.append(row | found[program])
                    say(_said(rows[-1]))
    return rows


def _contenders(
    methods: Sequence[str], ranks: Sequence[int]
) -> list[tuple[str, AdapterConfig | None]]:
    found: list[tuple[str, AdapterConfig | None]] = [
        (BASE, None),
        (UNMERGED, AdapterConfig("lora", rank=ranks[0])),
    ]
    wide = [m for m in methods if METHODS[m].widens]
    return found + [(m, AdapterConfig(m, rank=rank)) for m in wide for rank in ranks]


def _said(row: TableRow) -> str:
    rank = "" if row["rank"] is None else f" r={row['rank']}"
    cycles = f"  {row['cycles'] / 1e6:.2f} M cycles" if "cycles" in row else ""
    return (
        f"{row['target']:<13} {row['model']:<13} batch {row['batch']:<2} {row['label'] + rank:<24}"
        f" {row['kernels']:4} kernels, {row['copies']} copies,"
        f" {row['temporaries'] / GIB:.3f} GiB of temporaries{cycles}"
    )


def _base_of(row: TableRow, rows: Sequence[TableRow]) -> TableRow:
    """The base's row of the same case."""
    case = ("target", "model", "layers", "batch")
    return next(r for r in rows if r["label"] == BASE and all(r[k] == row[k] for k in case))


def page(result: Mapping[str, Any], pictures: Sequence[str]) -> str:
    """The page in Markdown.

    Args:
      result: {"rows": of `measure`, "environment": ...}.
      pictures: file names of the pictures to show.
    """
    rows, env = result["rows"], result["environment"]
    lines = [
        "# Decode, compiled for devices that are absent",
        "",
        "**Compiled for, not run.** The real compilers of TPUs (libtpu) and of NVIDIA GPUs (XLA's"
        " CUDA plugin, without autotuning, which needs the device) compile prefill and token loop"
        f" from shapes; their output is read. {DTYPE}, greedy, prompt of 128 tokens and 128 new"
        " ones, the first layers of each model as the table says.",
        "",
        "- kernels: operations in the token loop's body that run a kernel of their own (on a TPU a"
        " bundle of instructions); copies that a TPU starts ahead beside other work are left out.",
        "- copies: those of them that write a whole kernel, table or cache anew; copies a call: the"
        " same outside the loop, once for all tokens.",
        "- arguments: weights and inputs, with the zero channels that fill widths up"
        " (`adapters/widths.py`); temporaries: of the whole program.",
        "- cycles: the TPU compiler's estimate of a token. of floor: these cycles and the copies"
        " started ahead, by their bytes, over the time to read weights and half-filled cache at"
        " the published bandwidth. prefill: the same of all that is not in the loop, over the time"
        " to read the layers or to multiply the prompts by them, whichever is longer, and to read"
        " the head. An estimate, no measurement.",
        "- A merge by addition (lora, ffa) has the base's program. An adapter that is enabled and"
        " idle has its method's.",
        "",
        *[f"![{name}]({name})\n" for name in pictures],
    ]
    for name in dict.fromkeys(row["target"] for row in rows):
        shown = [_line(row, rows) for row in rows if row["target"] == name]
        lines += [f"## {name}", "", markdown_table(shown, list(shown[0])), ""]
    return "\n".join([*lines, origin_line(env), ""])


def _line(row: TableRow, rows: Sequence[TableRow]) -> dict[str, Any]:
    base = _base_of(row, rows)
    line = {
        "model": row["model"],
        "layers": row["layers"],
        "batch": row["batch"],
        "": row["label"],
        "rank": "-" if row["rank"] is None else row["rank"],
        "kernels": row["kernels"],
        "more than base": row["kernels"] - base["kernels"],
        "copies": row["copies"],
        "copies a call": row["call_copies"],
        "arguments, GiB": f"{row['arguments'] / GIB:.3f}",
        "x base": f"{row['arguments'] / base['arguments']:.3f}",
        "temporaries, GiB": f"{row['temporaries'] / GIB:.3f}",
    }
    if "cycles" in row:
        line |= {
            "cycles, M": f"{row['cycles'] / 1e6:.3f}",
            "started ahead, MB": f"{row['async_bytes'] / 1e6:.1f}",
            "of floor": f"{row['floor_share']:.2f}",
            "prefill, M": f"{row['prefill_cycles'] / 1e6:.3f}",
            "of its floor": f"{row['prefill_share']:.2f}",
        }
    return line


def write(result: Mapping[str, Any], out: str | Path) -> None:
    """Write <out>.json, <out>.md and <out>-kernels as PNG and SVG: kernels of a token by method.

    Args:
      result: as for `page`.
      out: path without a suffix.
    """
    out, rows = Path(out), result["rows"]
    first = {k: rows[0][k] for k in ("model", "batch", "layers")}
    series: dict[str, dict[str, float]] = {}
    for row in rows:
        if all(row[k] == value for k, value in first.items()):
            found = series.setdefault(row["target"], {})
            found[row["label"]] = max(row["kernels"], found.get(row["label"], 0))
    title = (
        f"Kernels of a token: {first['model']}, {first['layers']} layers, batch {first['batch']}"
    )
    grouped_bars(series, f"{out}-kernels", f"{title} (compiled for, not run)", "kernels")
    write_result(out, result, page(result, [f"{out.name}-kernels.png"]))
