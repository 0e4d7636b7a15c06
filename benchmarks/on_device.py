"""The paper's second figure on this machine's CPU: latency in llama.cpp and LiteRT of the base,
LoRA beside it (llama.cpp), LoRA merged and fused zFLoRA, each in float and quantised files.

Command: python benchmarks/on_device.py --python ENV/bin/python --litert-python ENV2/bin/python
(about 25 minutes on an idle core for llama.cpp, 20 for LiteRT). Without one of the two options that
runtime is left out; types that are not measured keep the rows that are there, with their origin.
ENV: an environment with `pip install xllamacpp numpy`; ENV2: one with `pip install '.[litert]'`.
SmolLM2-135M (the packaged one), adapters of rank 16 moved by noise. Writes results/on_device.json,
.md and -tpot.png, -ttft.png.

Each contender is a process that computes with one thread. llama.cpp's stays alive; LiteRT's begins
anew for every turn, because the memory that it gets at its start decides its speed (one file took
24 ms a token in one process and 33 in another, the same in all their turns). Those of a type take
turns: a turn is a prompt of 128 tokens (TTFT: the first token) and 64 greedy tokens (TPOT: the mean
of those after the first). Ratios are to the base of the same type within a round. The base of q4_1
is the packaged file's own blocks (quant "keep"), and so are the bases inside the fused models; LoRA
is merged into numbers, which are rounded anew.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from on_device_files import BASE, BESIDE, LITERT, RANK, moved, size, write_files, write_litert

ROOT = Path(__file__).resolve().parent.parent
# The key of a worker's job -> its script.
WORKERS = {
    "gguf": ROOT / "tools" / "llama_cpp_worker.py",
    "litert": ROOT / "tools" / "litert_worker.py",
}
TYPES = ("f32", "f16", "q8_0", "q4_0", "q4_1")
KINDS = ("ttft_ms", "tpot_ms", "ttft_cpu_ms", "tpot_cpu_ms")


class Worker:
    """A process of one of `WORKERS` that has loaded a job."""

    def __init__(self, python: str, job: dict[str, Any], longest: int) -> None:
        [script] = [script for key, script in WORKERS.items() if key in job]
        command = [python, str(script), json.dumps(job | {"longest": longest})]
        env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": ""}
        with tempfile.TemporaryFile() as errors:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env=env,
            )
            if not self._read():
                self.close()
                errors.seek(0)
                words = errors.read().decode(errors="replace")[-2000:]
                raise SystemExit(f"error: {python} cannot run {job}:\n{words}")

    def _read(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline()

    def ask(self, prompt: list[int], new_tokens: int) -> dict[str, Any]:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"prompt": prompt, "new_tokens": new_tokens}) + "\n")
        self.process.stdin.flush()
        if not (line := self._read()):
            raise SystemExit(f"error: a worker ended with {self.process.wait()}")
        return json.loads(line)

    def close(self) -> None:
        self.process.communicate()  # the end of its input ends it


def prompt_ids(length: int) -> list[int]:
    """The first tokens of a page of the documentation."""
    from zflora_jax.hf.load import model_tokenizer

    text = (ROOT / "docs" / "method.md").read_text(encoding="utf-8")
    return model_tokenizer("smollm2-135m")(text[: 20 * length])["input_ids"][:length]


def own_lora_tokens(prompt: list[int], new_tokens: int) -> list[int]:
    """This project's greedy tokens with the LoRA beside the base, in float32."""
    import zflora_jax as zf

    model = zf.load_model("smollm2-135m")
    adapter = zf.AdapterConfig("lora", rank=RANK)
    [found] = zf.generate_tokens(
        model,
        [prompt],
        max_new_tokens=new_tokens,
        stop_token_ids=(),
        adapter=adapter,
        adapters=moved(model, adapter),
    )
    return [int(token) for token in found]


def agreement(a: list[int], b: list[int]) -> int:
    """How many tokens are the same before the first that differs."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), len(a))


def check_lora(tokens: dict[str, list[int]], want: list[int] | None) -> None:
    """Stop where llama.cpp did not apply the LoRA, or not as this project does (`want`)."""
    if tokens[BESIDE] == tokens[BASE]:
        raise SystemExit("error: LoRA beside the base changes no token: it was not applied")
    if want is not None and tokens[BESIDE] != want:
        same = agreement(tokens[BESIDE], want)
        raise SystemExit(f"error: of {len(want)} tokens of LoRA beside the base {same} are ours")


def measure(kind: str, args: argparse.Namespace, prompt: list[int]) -> list[dict[str, Any]]:
    """A row for each contender of a type."""
    from zflora_jax.bench.timing import ratio, summary, turns

    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        longest = len(prompt) + args.new_tokens
        if kind in LITERT:
            python, jobs = (
                args.litert_python,
                write_litert(Path(folder), kind, args.litert_python, longest),
            )
        else:
            python, jobs = args.python, write_files(Path(folder), kind)
        workers: dict[str, Worker] = {}
        tokens: dict[str, list[int]] = {}

        def start(label: str) -> None:
            """A process of its own, warmed up."""
            if label in workers:
                workers[label].close()
            workers[label] = Worker(python, jobs[label], longest)
            tokens[label] = workers[label].ask(prompt, args.new_tokens)["tokens"]

        stack.callback(lambda: [worker.close() for worker in workers.values()])
        for label in jobs:
            start(label)
        if BESIDE in tokens:
            check_lora(tokens, own_lora_tokens(prompt, args.new_tokens) if kind == "f32" else None)
        found: dict[str, dict[str, list[float]]] = {
            label: {name: [] for name in KINDS} for label in jobs
        }
        for label in turns(list(jobs), args.rounds):
            if kind in LITERT and found[label]["tpot_ms"]:
                start(label)
            row = workers[label].ask(prompt, args.new_tokens)
            for name in KINDS:
                found[label][name].append(row[name])
        rows = []
        for label, job in jobs.items():
            row = {"type": kind, "": label, "bytes": size(job)}
            for name in KINDS:
                row |= summary(found[label][name], name)
                row[f"{name}_all"] = found[label][name]
                row[f"{name}_ratio"] = ratio(found[label][name], found[BASE][name])
            rows.append(row)
            print({key: value for key, value in row.items() if "_all" not in key}, flush=True)
        return rows


def page(result: dict[str, Any]) -> str:
    """The page of a result file's content."""
    from zflora_jax.reporting.provenance import origin_line
    from zflora_jax.reporting.tables import markdown_table

    settings, bases = result["settings"], {}
    origins = "\n\n".join(
        f"{', '.join(part['types'])}: {origin_line(part['environment'])}"
        for part in result["parts"]
    )
    shown = []
    for row in result["rows"]:
        base = bases.setdefault(row["type"], row)
        cells = {"type": row["type"], "": row[""], "MB": f"{row['bytes'] / 1e6:.1f}"}
        cells["x base"] = f"{row['bytes'] / base['bytes']:.3f}"
        for name, title in (("ttft", "TTFT"), ("tpot", "TPOT")):
            least, most = row[f"{name}_ms_min"], row[f"{name}_ms_max"]
            cells[f"{title}, ms"] = f"{row[f'{name}_ms']:.1f} [{least:.1f}, {most:.1f}]"
            cells[f"{title} x base"] = f"{row[f'{name}_ms_ratio']:.3f}"
            cells[f"{title} x base, CPU time"] = f"{row[f'{name}_cpu_ms_ratio']:.3f}"
        shown.append(cells)
    runtimes, litert = "llama.cpp", ""
    if any(kind in LITERT for kind in bases):
        runtimes += " and LiteRT"
        litert = (
            '\n"litert": files of `zflora export --format litert` in LiteRT\'s own runtime; its'
            " converter has\nno form for LoRA beside a base."
        )
    return f"""# In {runtimes}, on a CPU

SmolLM2-135M, adapters of rank {RANK} moved by noise, one thread; CPU figures, which say nothing
about a phone's NPU or a GPU. Each contender is a process, LiteRT's a new one for every turn; those
of a type take turns. A turn is a prompt of {settings["prompt"]} tokens (TTFT: the first token) and
{settings["new_tokens"]} greedy tokens (TPOT: the mean of those after the first). Medians of
{settings["rounds"]} rounds [minimum, maximum]; ratios to the base of the same type within a round.
"q4_1": the packaged file's own blocks, byte for byte, in the base and in the fused models; LoRA is
merged into numbers, which are rounded anew.{litert}

{markdown_table(shown, list(shown[0]))}

![TPOT](on_device-tpot.png)
![TTFT](on_device-ttft.png)

{origins}
"""


def draw(result: dict[str, Any], out: str) -> None:
    from zflora_jax.reporting.plots import grouped_bars

    for name in ("ttft", "tpot"):
        values: dict[str, dict[str, float]] = {}
        for row in result["rows"]:
            values.setdefault(row[""], {})[row["type"]] = 100 * row[f"{name}_ms_ratio"]
        title = f"{name.upper()} on a CPU, one thread"
        grouped_bars(values, f"{out}-{name}", title, "% of the base of the same type")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--python", metavar="FILE", help="one that has xllamacpp and numpy")
    parser.add_argument("--litert-python", metavar="FILE", help="one that has the extra litert")
    parser.add_argument(
        "--types", nargs="+", choices=[*TYPES, *LITERT], help="default: of the runtimes given"
    )
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", default="results/on_device")
    args = parser.parse_args()
    if min(args.rounds, args.prompt, args.new_tokens - 1) < 1:
        parser.error(
            "--rounds, --prompt: give at least 1; --new-tokens: at least 2, for a time between"
            " tokens"
        )
    args.types = args.types or [
        *(TYPES if args.python or not args.litert_python else ()),
        *(LITERT if args.litert_python else ()),
    ]
    needed = {
        "python": ("xllamacpp", set(args.types) - set(LITERT)),
        "litert_python": ("the extra litert", set(args.types) & set(LITERT)),
    }
    for name, (package, kinds) in needed.items():
        python = getattr(args, name)
        if kinds and (not python or not Path(python).is_file()):
            parser.error(
                f"--{name.replace('_', '-')} {python}: give the Python of an environment that has"
                f" {package}; the docstring says how to make one"
            )
    return args


def main() -> None:
    args = parse_args()
    from zflora_jax.reporting.files import write_result
    from zflora_jax.reporting.provenance import environment

    prompt = prompt_ids(args.prompt)
    settings = {
        key: value for key, value in vars(args).items() if key in ("prompt", "new_tokens", "rounds")
    }
    rows: list[dict[str, Any]] = []
    before = kept(args, settings)  # before anything slow
    for kind in args.types:
        rows += measure(kind, args, prompt)
        done = [*dict.fromkeys(row["type"] for row in rows)]
        parts = [*before["parts"], {"types": done, "environment": environment()}]
        result = {"rows": in_order([*before["rows"], *rows]), "settings": settings, "parts": parts}
        write_result(args.out, result, page(result))  # a stopped run keeps what it has
        draw(result, args.out)


def kept(args: argparse.Namespace, settings: dict[str, Any]) -> dict[str, Any]:
    """What the result file holds of types that are not measured now, with the same settings."""
    file = Path(f"{args.out}.json")
    found: dict[str, Any] = {"rows": [], "parts": []}
    if not file.is_file():
        return found
    there = json.loads(file.read_text(encoding="utf-8"))
    if there["settings"] != settings and {row["type"] for row in there["rows"]} - {*args.types}:
        raise SystemExit(
            f"error: {file} has other types, measured with {there['settings']}, not {settings}."
            " Give the same settings, or another --out."
        )
    if there["settings"] != settings:
        return found
    found["rows"] = [row for row in there["rows"] if row["type"] not in args.types]
    for part in there["parts"]:
        if types := [kind for kind in part["types"] if kind not in args.types]:
            found["parts"].append(part | {"types": types})
    return found


def in_order(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    order = [*TYPES, *LITERT]
    return sorted(rows, key=lambda row: order.index(row["type"]))


if __name__ == "__main__":
    main()
