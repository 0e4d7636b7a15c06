"""The speed targets of this project, each beside what the benchmarks measured: results/speed.md and
.json, from their JSON files alone.

Command: python benchmarks/speed.py
(after `zflora bench latency`, `zflora bench train`, benchmarks/startup.py,
benchmarks/vllm_latency.py and, where there is a GPU, benchmarks/gpu.py)
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from zflora_jax.reporting.files import write_result
from zflora_jax.reporting.provenance import device_line
from zflora_jax.reporting.tables import markdown_table

Row = dict[str, Any]
GPU = (
    "no GPU could be had; benchmarks/gpu.py makes the table in one call, and is tested on tiny"
    " shapes"
)
# What a target that is not reached owes to, measured: shown beside it.
CAUSES: dict[str, str] = {
    "read-bandwidth floor": (
        "XLA's products of one row read kernels more slowly than a sum reads memory, and the 24"
        " small kernels of a layer between them take 1 ms a step (profile). Tried"
        " (decode_variants.md, time over this): kernels [in, out] 1.30, [out, in] from the left"
        " 1.09, from the right without halves 1.10, all in halves 1.02, scan over layers 1.38,"
        " XLA's vectors of 512 bits 0.96 (and 256 0.96 of 512 as measured at commit 3083f4d: not"
        " told apart), head as (d, V) 0.94 for 113 MB more, bfloat16 1.02. Without a table (one run"
        " each): attention as sums, or divided after its product, no gain"
    ),
    "over transformers'": "the same products",
    "time over PEFT's": (
        "profile (an AMD EPYC, 2 CPUs of 0.2 TFLOP/s, commit c51f735): products with frozen kernels"
        " and the head take 3.1 of 4.1 s, at the rate that these cores have; attention 0.4,"
        " adapters 0.3, stacking of activations by scan 0.3. Tried without gain: unrolled layers"
        " (fewer copies, more page faults), XLA's flags for vector width, scheduler, tiling, ISA;"
        " larger pages and a heap that is not given back help PEFT as much"
    ),
    "peak memory over PEFT's": "not known",
}


def commit_of(env: Row) -> str:
    return f"{(env['commit'] or 'unknown')[:9]}{' +changes' if env['dirty'] else ''}"


def require_same(name: str, found: Row, want: Row) -> None:
    """SystemExit where a result is not of the set-up that the targets are for."""
    if different := {key: found[key] for key in want if found[key] != want[key]}:
        raise SystemExit(
            f"{name}.json was measured with {different}; the targets are for {want}. Run its"
            " benchmark again."
        )


def row(
    what: str, target: str, value: float | None, limit: float, source: Row, unit: str = "x"
) -> Row:
    env = source["environment"]
    reached = value is not None and value <= limit
    found = {
        "what": what,
        "target": target,
        "measured": "missing" if value is None else f"{value:.3f} {unit}",
        "reached": "yes" if reached else "no",
    }
    return found | {"command": env["command"], "commit": commit_of(env), "device": device_line(env)}


def at(found: Row, label: str, **case: int) -> Row | None:
    """The row of the latency table with this label and case, if it was measured."""
    for one in found["rows"]:
        if one["label"] == label and all(one[key] == value for key, value in case.items()):
            return one
    return None


def decode_rows(found: Row) -> Iterator[Row]:
    first = {key: found["rows"][0][key] for key in ("rank", "batch", "prompt")}
    require_same(
        "latency",
        found["settings"] | first,
        {"model": "smollm2-135m", "dtype": "float32", "batch": 1},
    )
    assert at(found, "base", **first) is not None
    yield from base_rows(found, first)
    for fused in found["rows"]:
        if fused["label"] == "zflora-minimal" and fused["rank"] <= 64:
            yield from fused_rows(found, fused)


def base_rows(found: Row, first: Row) -> Iterator[Row]:
    """The base over the bandwidth floor and over transformers, in the first batch and prompt."""
    where = f"batch {first['batch']}, prompt {first['prompt']}"
    # The base and transformers do not depend on the rank: every rank is another case of the same.
    same = [r for r in found["rows"] if all(r[k] == first[k] for k in ("batch", "prompt"))]
    floors = [1 / r["floor_share"] for r in same if r["label"] == "base"]
    baselines = [1 / r["tpot_ratio"] for r in same if r["label"] == "transformers"]
    for what, limit, values in (
        ("the read-bandwidth floor", 1.2, floors),
        ("transformers'", 0.36, baselines),
    ):
        spread = (
            f"median of {len(values)} cases, {min(values):.3f} to {max(values):.3f}"
            if values
            else "not measured"
        )
        value = statistics.median(values) if values else None
        what = f"decode of the base, {where}: TPOT over {what} ({spread})"
        yield row(what, f"<= {limit:.2f}", value, limit, found)


def fused_rows(found: Row, fused: Row) -> Iterator[Row]:
    """A fused zflora-minimal over the base, and an un-merged LoRA of the same case."""
    case = {key: fused[key] for key in ("rank", "batch", "prompt")}
    limit, name = (
        fused["bytes_ratio"] + 0.01,
        ", ".join(f"{key} {value}" for key, value in case.items()),
    )
    target = f"<= {limit:.3f}, its share of bytes + 0.01"
    again = {label: at(found, label, **case) for label in ("lora merged", "zflora-minimal idle")}
    for measure in ("tpot", "ttft"):
        seen = ", ".join(
            f"{label} {other[f'{measure}_ratio']:.3f}" for label, other in again.items() if other
        )
        why = (
            "the same shapes again (merged: the base's, idle: zflora-minimal's):"
            f" {seen or 'not measured'}; beyond that noise not explained"
        )
        what = f"zflora-minimal fused, {name}: {measure.upper()} over the base's"
        yield row(what, target, fused[f"{measure}_ratio"], limit, found) | {"why not": why}
    if beside := at(found, "lora un-merged", **case):
        what = f"lora un-merged, {name}: TPOT over the base's"
        yield row(what, "reported", beside["tpot_ratio"], float("inf"), found)


def train_rows(found: Row) -> Iterator[Row]:
    limits = {0.0: (0.85, 0.8), 0.5: (0.75, None)}
    for one in found["rows"]:
        if (
            "step_ratio" not in one
            or one["label"] == "PEFT lora"
            or one["case"]["masked"] not in limits
        ):
            continue
        case, (step, memory) = one["case"], limits[one["case"]["masked"]]
        require_same(
            "train",
            case,
            {"model": "smollm2-135m", "dtype": "float32", "rank": 16, "batch": 8, "length": 128},
        )
        what = (
            f"training step, {one['label']}, {case['batch']} x {case['length']}, r={case['rank']},"
            f" {case['masked']:.0%} masked"
        )
        yield row(f"{what}: time over PEFT's", f"<= {step}", one["step_ratio"], step, found)
        if memory:
            yield row(
                f"{what}: peak memory over PEFT's",
                f"<= {memory}",
                one["memory_ratio"],
                memory,
                found,
            )


def startup_rows(found: Row) -> Iterator[Row]:
    for kind, turns in found["turns"].items():
        warm = kind == "first step, warm"
        value = statistics.median(turn["total"] for turn in turns)
        yield row(
            f"start-up: {kind}, from the command",
            "<= 12 s" if warm else "reported",
            value,
            12.0 if warm else float("inf"),
            found,
            "s",
        )


def vllm_rows(found: Row) -> Iterator[Row]:
    for one in found["rows"]:
        name, shown = one[""], f"{one['model']}, batch {one['batch']}"
        if name == "this project's decode":
            (base,) = (
                r
                for r in found["rows"]
                if r[""] == "vLLM, base"
                and (r["model"], r["batch"]) == (one["model"], one["batch"])
            )
            starts = [
                ours / theirs
                for ours, theirs in zip(one["tpot_ms_all"], base["tpot_ms_all"], strict=True)
            ]
            what = (
                f"{shown}: our TPOT over vLLM's (CPU build, float32; in {len(starts)} starts"
                f" {min(starts):.2f} to {max(starts):.2f})"
            )
            why = (
                f"vLLM's base took {min(base['tpot_ms_all']):.0f} to {max(base['tpot_ms_all']):.0f}"
                f" ms, ours {min(one['tpot_ms_all']):.0f} to "
            )
            why += f"{max(one['tpot_ms_all']):.0f}: processes read memory at different rates"
            yield row(what, "< 1", one["tpot_ratio"], 1.0, found) | {"why not": why}
        elif name != "vLLM, base":
            yield row(
                f"{shown}: {name}, TPOT over vLLM's base",
                "reported",
                one["tpot_ratio"],
                float("inf"),
                found,
            )


SOURCES = {
    "latency": decode_rows,
    "train": train_rows,
    "startup": startup_rows,
    "vllm_latency": vllm_rows,
    "vllm_latency_1b": vllm_rows,
}


def collect(folder: Path) -> Row:
    """The rows of all benchmarks whose JSON is in `folder`, and what is missing."""
    rows, missing = list[Row](), list[str]()
    for name, read in SOURCES.items():
        if (file := folder / f"{name}.json").is_file():
            rows += read(json.loads(file.read_text(encoding="utf-8")))
        else:
            missing.append(f"{name}.json is missing")
    for one in rows:
        if one["target"] == "reported":
            one["reached"] = "-"
        elif one["reached"] == "no":
            one["why not"] = one.get("why not") or next(
                (why for part, why in CAUSES.items() if part in one["what"]), "not known"
            )
        else:
            one.pop("why not", None)
    if (file := folder / "gpu/gpu.json").is_file():
        gpu = json.loads(file.read_text(encoding="utf-8"))
        env = gpu["environment"]
        rows += [
            one | {"command": env["command"], "commit": commit_of(env), "device": env["device"]}
            for one in gpu["targets"]
        ]
    else:
        missing.append(f"the H100 rows are missing: {GPU}")
    return {"rows": rows, "missing": missing}


def page(result: Row) -> str:
    """A table for each benchmark: targets first, then what missed them, then the commands."""
    sources = dict[tuple[str, str, str], list[Row]]()
    for one in result["rows"]:
        key = (one["command"], one["commit"], one["device"])
        sources.setdefault(key, []).append(one)
    lines = [
        "# Speed: targets and measurements",
        "",
        "SmolLM2-135M in float32 unless a row names another model. `python benchmarks/speed.py`"
        " makes this page from the JSON files of the benchmarks; their own pages have the details.",
        "",
    ]
    columns = ["measurement", "target", "measured", "reached"]
    for rows in sources.values():
        shown = [{"measurement": one["what"], **one} for one in rows]
        lines += [markdown_table(shown, columns), ""]
    if missed := [one for one in result["rows"] if "why not" in one]:
        lines += ["## Targets that were missed, and why", ""]
        lines += [f"- **{one['what']}**: {one['why not']}." for one in missed] + [""]
    lines += ["## Commands, in the order of the tables", ""]
    for command, commit, device in sources:
        lines.append(f"- `{command}`; commit {commit}; device {device}.")
    lines += ["", *(f"Note: {line}.\n" for line in result["missing"])]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--results", default="results", metavar="DIR")
    folder = Path(parser.parse_args().results)
    if not folder.is_dir():
        parser.error(
            f"--results {folder} is no directory: give the one that the benchmarks wrote their"
            " JSON to"
        )
    result = collect(folder)
    write_result(folder / "speed", result, page(result))


if __name__ == "__main__":
    main()
