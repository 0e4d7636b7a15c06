"""Each method's accuracy against its costs at decode.

Command: python benchmarks/cost_quality.py [--parts quality decode compiled]
(about 10 minutes on 2 CPU cores; `compiled` needs the extra target-cuda)
Writes results/cost_quality.json, .md and .png. SmolLM2-135M with the adapters of
studies/configs/accuracy.py; a part that is not named keeps its values.
quality: differences to LoRA from the records of accuracy_arithmetic in studies/.
decode: TPOT over the base's on this CPU, float32, batch 1, medians of turns in one process.
compiled: kernels and bytes of a bfloat16 token, compiled for an H100 and not run.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Mapping
from typing import Any

from harness import ROOT, arguments, at_least, origins, perturbed, write_part

sys.path.append(str(ROOT))  # studies/

TABLE = "accuracy_arithmetic"
MERGED, UNMERGED = "all merged by addition", "lora unmerged"
PROMPT, NEW_TOKENS = 64, 64
COLUMNS = {
    "method": "method",
    "points": "accuracy - LoRA's, points",
    "kernels": "kernels added, H100",
    "bytes": "bytes / base, H100's widths",
    "tpot": "TPOT / base, this CPU",
}


def methods() -> dict[str, Any]:
    """Label -> adapter of the accuracy tables."""
    from studies.configs.accuracy import ALL

    return ALL


def program_of(label: str, adapters: Mapping[str, Any]) -> str:
    """Returns the decode program of a method: a merge by addition has the base's, and methods that
    differ only in training share one.
    """
    from zflora_jax.core.adapter_config import METHODS

    adapter = adapters[label]
    if not METHODS[adapter.method].widens:
        return MERGED
    return next(first for first, same in adapters.items() if same == adapter)


def programs() -> dict[str, Any]:
    """Program -> adapter; None: the base."""
    found = methods()
    used = {program_of(label, found) for label in found} - {MERGED}
    return {MERGED: None, UNMERGED: found["lora"]} | {name: found[name] for name in sorted(used)}


def quality(table: Any, adapters: Mapping[str, Any]) -> dict[str, Any]:
    """Label -> "points", the difference to LoRA with the ends of its interval, and "program".
    Methods that lack a seed are left out.

    Args:
      table: The `studies.tables.Table` of one task.
      adapters: Label -> adapter.
    """
    found = {"lora": {"points": [0.0] * 3, "program": MERGED}}
    for label, differences in table.differences.items():
        if label != "base":
            (gap,) = differences.values()
            points = [gap.mean, gap.low, gap.high]
            found[label] = {"points": points, "program": program_of(label, adapters)}
    return found


def decode(repeats: int) -> dict[str, dict[str, float]]:
    """Program -> TPOT on this CPU and its ratio to the base's within a turn, with quartiles."""
    import zflora_jax as zf
    from zflora_jax.adapters.packing import pack_for_decode
    from zflora_jax.core import trees
    from zflora_jax.experiments.latency import contender, decode_turns, summary

    base, shape = zf.load_model("smollm2-135m"), (1, PROMPT, NEW_TOKENS)
    packed, ready = pack_for_decode(base), {}
    for label, adapter in programs().items():
        if adapter is None:
            ready[label] = contender(packed, *shape)
            continue
        blocks = perturbed(base, adapter)
        if label == UNMERGED:
            layers = trees.unstack_layers(blocks, base.config.num_layers)
            ready[label] = contender(packed, *shape, adapter, layers)
        else:
            ready[label] = contender(pack_for_decode(zf.fuse(base, adapter, blocks)), *shape)
    turns, found = decode_turns(ready, NEW_TOKENS, repeats), {}
    for label, of in turns.items():
        ratios = [a / b for a, b in zip(of["tpot_ms"], turns[MERGED]["tpot_ms"], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
        found[label] = summary(of["tpot_ms"], "tpot_ms")
        found[label] |= {"tpot_ratio": middle, "tpot_ratio_low": low, "tpot_ratio_high": high}
    return found


def compiled() -> dict[str, dict[str, float]]:
    """Program -> kernels of a token as XLA's CUDA compiler plans them, and bytes of its arrays."""
    from decode_programs import DecodeCase, loop_row

    from zflora_jax.core.presets import preset
    from zflora_jax.parallel.targets import target

    config, where, found = preset("smollm2-135m"), target("cuda:h100"), {}
    for label, adapter in programs().items():
        row = loop_row(DecodeCase(config, adapter, prompt=PROMPT, new_tokens=NEW_TOKENS), where)
        found[label] = {name: row[name] for name in ("kernels", "read_bytes")}
        print(label, found[label], flush=True)
    return found


def rows(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Returns a row per method: its accuracy and the costs of its program."""
    cpu, h100, found = result["decode"], result["compiled"], list[dict[str, Any]]()
    base = h100[MERGED]
    for label, of in result["quality"].items():
        names = {of["program"]: f"{label} merged" if of["program"] == MERGED else label}
        names |= {UNMERGED: UNMERGED} if label == "lora" else {}
        for program, name in names.items():
            found.append(
                {
                    "method": name,
                    "points": of["points"],
                    "kernels": h100[program]["kernels"] - base["kernels"],
                    "bytes": h100[program]["read_bytes"] / base["read_bytes"],
                    "tpot": [cpu[program][f"tpot_ratio{end}"] for end in ("", "_low", "_high")],
                }
            )
    return found


def page(result: Mapping[str, Any]) -> str:
    """Returns the page in Markdown."""
    from zflora_jax.reporting.tables import markdown_table

    def interval(values: list[float], form: str, none: str) -> str:
        middle, low, high = (format(value, form) for value in values)
        return f"{middle} [{low}, {high}]" if values[2] > values[1] else none

    shown = [
        row
        | {"points": interval(row["points"], "+.1f", "0")}
        | {"tpot": interval(row["tpot"], ".3f", "1")}
        for row in rows(result)
    ]
    return f"""# Accuracy against cost at decode

Unmerged LoRA keeps the base but adds kernels in every projection. A widened model keeps the base
and adds few or none. A merge by addition costs nothing at decode, but another task then needs the
base back ([task_switch](task_switch.md)).

![Accuracy against cost](cost_quality.png)

SmolLM2-135M, adapters with the number of parameters of LoRA r=16.

- accuracy: difference to LoRA's in [{TABLE}]({TABLE}.md), with its 95% interval.
- kernels of a token, batch 1, bfloat16: compiled for an H100, not run.
- bytes of such a token: counted, with the weights padded to an H100's widths. Its products take
  whole channels of 32 and MLP units of 128, so zflora-minimal's 21 and 21 are read as 32 and 128.
- TPOT: measured on this CPU in float32, batch 1; median of the ratios within a turn [quartiles].

{markdown_table(shown, COLUMNS)}

decode: {origins(result, "decode")}

compiled: {origins(result, "compiled")}
"""


def draw(result: Mapping[str, Any], out: object) -> None:
    """Draws accuracy and the three costs of every method."""
    from plots import dots

    panels = {
        "accuracy - LoRA's, points\n(arithmetic, 95% interval)": ("points", 0.0),
        "kernels added per token\n(compiled for H100)": ("kernels", 0.0),
        "bytes per token / base\n(counted, H100's widths)": ("bytes", 1.0),
        "TPOT / base\n(measured on a CPU, quartiles)": ("tpot", 1.0),
    }

    def values(row: Mapping[str, Any], key: str) -> tuple[float, ...]:
        return tuple(row[key]) if isinstance(row[key], list) else (row[key],)

    dots(
        {
            label: {row["method"]: values(row, key) for row in rows(result)}
            for label, (key, _) in panels.items()
        },
        f"{out}",
        "Accuracy of each method, and its cost at decode",
        {label: mark for label, (_, mark) in panels.items()},
    )


def main() -> None:
    parts = ("quality", "compiled", "decode")  # the CUDA compiler has to start before jax's CPU
    parser = arguments(__doc__, "cost_quality")
    parser.add_argument("--parts", nargs="+", choices=parts, default=list(parts))
    parser.add_argument("--repeats", type=int, default=9)
    args = parser.parse_args()
    at_least(parser, args, repeats=2)
    result: dict[str, Any] = {}
    for part in sorted(args.parts, key=parts.index):
        if part == "quality":
            from studies.study import studies
            from studies.tables import Table

            [study] = [study for study in studies("accuracy") if study.name == TABLE]
            found: Any = quality(Table.read(study), methods())
        else:
            found = decode(args.repeats) if part == "decode" else compiled()
        result = write_part(args.out, part, found, page)
    draw(result, args.out)


if __name__ == "__main__":
    main()
