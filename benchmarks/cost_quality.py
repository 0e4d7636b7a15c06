"""Where each method stands: what it answers against what it costs at decode.

Command: python benchmarks/cost_quality.py [--parts decode compiled]     (`compiled` needs the CUDA
plugin, see docs/scaling.md). SmolLM2-135M with the adapters of configs/accuracy.py, whose table of
arithmetic must be there: accuracy is read from results/accuracy_arithmetic.json. decode: TPOT over
the base's on this CPU, float32, batch 1, medians of turns in one process. compiled: kernels of a
token in bfloat16, compiled for an H100 and not run, and the bytes of its arrays at that card's
widths. Without --parts both are made; a part that is left out is taken from the result that is
there, and `--parts` alone makes neither.
Writes results/cost_quality.json, .md, .png and .svg.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "configs"))

TABLE = "accuracy_arithmetic"
MERGED = "all merged by addition"
UNMERGED = "lora un-merged"
PROMPT, NEW_TOKENS = 64, 64


def program_of(label: str) -> str:
    """The program that a method runs at decode: every merge by addition has the base's, and methods
    that are trained otherwise with the same adapter have one.
    """
    import accuracy

    from zflora_jax.core.adapter_config import METHODS

    adapter = accuracy.ALL[label]
    if not METHODS[adapter.method].widens:
        return MERGED
    return next(first for first, same in accuracy.ALL.items() if same == adapter)


def adapters() -> dict[str, Any]:
    """Program -> adapter of all that cost something at decode: methods that widen, fused, and LoRA
    beside the base.
    """
    import accuracy

    programs = [program_of(label) for label in accuracy.ALL]
    widen = {label: accuracy.ALL[label] for label in programs if label != MERGED}
    return {UNMERGED: accuracy.LORA} | widen


def decode(repeats: int) -> dict[str, dict[str, float]]:
    """Label -> TPOT on this CPU and its ratio to the base's within a turn, with quartiles."""
    import jax

    import zflora_jax as zf
    from zflora_jax.adapters.packing import pack_for_decode
    from zflora_jax.bench.contenders import contender
    from zflora_jax.bench.timing import decode_turns, ratios, summary
    from zflora_jax.core import trees

    base, shape = zf.load_model("smollm2-135m"), (1, PROMPT, NEW_TOKENS)
    packed = pack_for_decode(base)
    ready = {MERGED: contender(packed, *shape)}
    for label, adapter in adapters().items():
        blocks = jax.tree.map(
            lambda x: x + 0.01, zf.init_adapters(jax.random.key(0), base, adapter)
        )
        if label == UNMERGED:
            beside = trees.unstack_layers(blocks, base.config.num_layers)
            ready[label] = contender(packed, *shape, adapter, beside)
        else:
            ready[label] = contender(pack_for_decode(zf.fuse(base, adapter, blocks)), *shape)
    found = decode_turns(ready, NEW_TOKENS, repeats)
    first = found[MERGED]["tpot_ms"]

    def quartiles(turns: list[float]) -> dict[str, float]:
        low, middle, high = statistics.quantiles(turns, n=4, method="inclusive")
        return {"tpot_ratio": middle, "tpot_ratio_low": low, "tpot_ratio_high": high}

    return {
        label: summary(of["tpot_ms"], "tpot_ms") | quartiles(ratios(of["tpot_ms"], first))
        for label, of in found.items()
    }


def compiled() -> dict[str, dict[str, float]]:
    """Label -> kernels of a token, as XLA's CUDA compiler plans them, and bytes of its arrays."""
    from zflora_jax.bench.compiled import loop_row
    from zflora_jax.bench.decode_case import DecodeCase
    from zflora_jax.core.presets import preset
    from zflora_jax.parallel.targets import target

    config, where = preset("smollm2-135m"), target("cuda:h100")
    found = {}
    for label, adapter in ({MERGED: None} | adapters()).items():
        row = loop_row(DecodeCase(config, adapter, prompt=PROMPT, new_tokens=NEW_TOKENS), where)
        found[label] = {name: row[name] for name in ("kernels", "read_bytes")}
        print(label, found[label], flush=True)
    return found


def quality(folder: Path) -> dict[str, list[float]]:
    """Label -> difference to LoRA in points, and the ends of its interval, of the methods that have
    all their seeds: with fewer the interval says too little of other seeds.
    """
    from zflora_jax.experiments.differences import Differences, headline

    table = json.loads((folder / f"{TABLE}.json").read_text(encoding="utf-8"))
    missing = {name.partition(" (")[0] for name in table["missing"]}
    gaps = {
        label: headline(of)
        for label, of in Differences.read(table).to_reference.items()
        if label != "base" and label not in missing
    }
    return {"lora": [0.0] * 3} | {k: [gap.mean, gap.low, gap.high] for k, gap in gaps.items()}


def rows(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A row for each method: what it answers, and the costs of its program."""
    cpu, h100 = result["decode"], result["compiled"]
    base, found = h100[MERGED], []
    for label, points in result["quality"].items():
        own = program_of(label)
        names = {own: f"{label} merged" if own == MERGED else label}
        names |= {UNMERGED: UNMERGED} if label == "lora" else {}
        for program, name in names.items():
            found.append(
                {
                    "method": name,
                    "points": points[0],
                    "interval": points[1:],
                    "kernels": h100[program]["kernels"] - base["kernels"],
                    "bytes": h100[program]["read_bytes"] / base["read_bytes"],
                    "tpot": [cpu[program][f"tpot_ratio{end}"] for end in ("", "_low", "_high")],
                }
            )
    return found


def _missing(result: Mapping[str, Any], part: str) -> list[str]:
    """The programs of methods that `part` does not have the costs of."""
    return sorted({MERGED, UNMERGED, *map(program_of, result["quality"])} - result[part].keys())


def page(result: Mapping[str, Any]) -> str:
    """The page of a result file's content."""
    from zflora_jax.reporting.provenance import origin_line
    from zflora_jax.reporting.tables import markdown_table

    columns = {
        "method": "method",
        "points": "less LoRA, points",
        "kernels": "kernels added, H100",
        "bytes": "bytes / base, H100's widths",
        "tpot": "TPOT / base, this CPU",
    }
    origins = [
        f"{part}: {origin_line(result['environments'][part])}" for part in ("decode", "compiled")
    ]
    merged = ", ".join(label for label in result["quality"] if program_of(label) == MERGED)
    head = f"""SmolLM2-135M, adapters of LoRA r=16's number of parameters. Points: a method's
accuracy in [{TABLE}]({TABLE}.md) less LoRA's. Kernels of a token, batch 1,
bfloat16: compiled for an H100, not run. Bytes of such a token: counted, of the weights at an H100's
widths and of the cache. TPOT: measured on this CPU in float32, batch 1, the median of the ratios
within a turn [quartiles]. A merge by addition has the base's program:
{merged}.

LoRA that is merged costs nothing, nor does any other merge by addition; what it gives up is the
base, which another task needs back ([task_switch](task_switch.md)). LoRA beside the base keeps it,
for kernels of its own in every projection; a method that widens keeps it with none or few. Most of
the bytes that zflora-minimal adds are filling: an H100's products take whole channels of 32 and MLP
units of 128 (`adapters.widths`), so its 21 and 21 are read as 32 and 128, and r = 32, m = 128 would
cost the same. Quartiles are no intervals of confidence."""
    shown = [row | {"points": _points(row), "tpot": _ratio(row)} for row in rows(result)]
    table = markdown_table(shown, columns)
    picture = "![Quality against cost](cost_quality.png)"
    title = "# Quality against cost at decode"
    return "\n\n".join([title, head, table, picture, *origins]) + "\n"


def _points(row: Mapping[str, Any]) -> str:
    low, high = row["interval"]
    return f"{row['points']:+.1f} [{low:+.1f}, {high:+.1f}]" if high > low else "0"


def _ratio(row: Mapping[str, Any]) -> str:
    middle, low, high = row["tpot"]
    return f"{middle:.3f} [{low:.3f}, {high:.3f}]" if high > low else "1"


def draw(result: Mapping[str, Any], out: str) -> None:
    from zflora_jax.reporting.plots import dots

    found = rows(result)
    points = {row["method"]: (row["points"], *row["interval"]) for row in found}
    panels = {
        "score less LoRA's, points\n(arithmetic, 95% interval)": ("points", 0.0),
        "kernels added per token\n(compiled for H100)": ("kernels", 0.0),
        "bytes per token / base\n(counted, H100's widths)": ("bytes", 1.0),
        "TPOT / base\n(measured on a CPU, quartiles)": ("tpot", 1.0),
    }
    dots(
        {
            label: points
            if key == "points"
            else {row["method"]: row[key] if key == "tpot" else (row[key],) for row in found}
            for label, (key, _) in panels.items()
        },
        out,
        "What a method answers, and what it costs at decode",
        {label: mark for label, (_, mark) in panels.items()},
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", nargs="*", choices=("decode", "compiled"))
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--accuracy", type=Path, default=Path("results"), metavar="DIR")
    parser.add_argument("--out", default="results/cost_quality")
    args = parser.parse_args()
    if args.repeats < 2:
        parser.error(f"--repeats {args.repeats}: quartiles need 2 or more.")
    from zflora_jax.reporting.files import write_json, write_result
    from zflora_jax.reporting.provenance import environment

    file, parts = Path(f"{args.out}.json"), ("compiled", "decode")
    if not (args.accuracy / f"{TABLE}.json").is_file():
        parser.error(f"{args.accuracy}/{TABLE}.json is not there: run configs/accuracy.py first")
    result = (
        json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {"environments": {}}
    )
    result["quality"] = quality(args.accuracy)
    # First what is compiled: the CUDA compiler does not start once jax has begun on the CPU.
    for part in sorted(parts if args.parts is None else args.parts):
        result[part] = decode(args.repeats) if part == "decode" else compiled()
        result["environments"][part] = environment()
        write_json(file, result)  # a run that is stopped later keeps it
    if all(name in result for name in parts):
        lacking = {part: missing for part in parts if (missing := _missing(result, part))}
        if lacking:
            parser.error(
                f"{file} lacks costs, {lacking}: make them with --parts {' '.join(lacking)}"
            )
        write_result(args.out, result, page(result))
        draw(result, args.out)


if __name__ == "__main__":
    main()
