"""Two processes train, evaluate, answer, fuse and export a model, each with less memory than its
float32 weights take; one process does the same.

Command: python benchmarks/two_processes.py     (about 15 minutes on 2 CPU cores, 10 GB of disk)
Writes results/two_processes.json and .md, and fails if a process needed more. The model has random
weights, written in bfloat16 and computed with in float32. The processes are on loopback, with
mesh.fsdp=2: one CPU device each, or one process with two. Memory is the peak of resident memory
(VmHWM), programs and files included. With --rlimit the kernel also refuses each of two processes
more private writable memory than the weights take (RLIMIT_DATA). That counts stacks and arenas
which are not resident, about 1 GB more, so it needs a larger model: --layers 40. glibc is told to
give large blocks back as they are freed (MALLOC_MMAP_THRESHOLD_; else it keeps those below 32 MB).
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SHAPE = {
    "hidden_size": 1536,
    "intermediate_size": 6144,
    "num_layers": 24,
    "num_heads": 12,
    "num_kv_heads": 12,
    "head_dim": 128,
}
CONFIG = """
from zflora_jax.config import *

def get_config():
    return RunConfig(
        model={model!r},
        adapter=AdapterConfig("zflora-minimal", rank=8),
        data=DataConfig("rows", data_dir={data!r}, batch_size=2, bucket_lengths=(32,)),
        optim=OptimConfig(warmup_steps=0, learning_rate=1e-3, eps=1e-3),
        train=TrainConfig(steps=3, log_every=1, save_every=None, loss_chunk=128),
        eval=EvalConfig(limit=2, batch_size=2, max_new_tokens=8),
        mesh=MeshConfig(fsdp=2),
    )
"""


# --- in a process of its own ----------------------------------------------------------------------


def status(field: str) -> int:
    """A size that the kernel has of this process, in bytes. VmHWM: the most that was resident since
    `forget_peak`; VmData: what RLIMIT_DATA counts.
    """
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}: this needs Linux")


def worker(argv: list[str], folder: Path, limit: int) -> int:
    """Run a command, and write its peak and seconds to a file in `folder`."""
    if limit:
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    from zflora_jax.cli.main import main

    start = time.perf_counter()
    if code := main(argv):
        return code
    found = {"command": argv[0], "peak": status("VmHWM"), "seconds": time.perf_counter() - start}
    (folder / peak_file(argv[0], os.environ.get("ZFLORA_PROCESS_ID", "0"))).write_text(
        json.dumps(found), encoding="utf-8"
    )
    return 0


def peak_file(command: str, number: object) -> str:
    """The name of the file with a process's peak."""
    return f"peak-{command}-{number}.json"


# --- the processes --------------------------------------------------------------------------------


def write_model(folder: Path, shape: dict[str, int]) -> int:
    """Write a random model, a tensor at a time, and a few rows; returns its bytes in float32."""
    import ml_dtypes
    import numpy as np

    sys.path.insert(0, str(ROOT / "tests"))
    from support.byte_tokenizer import byte_tokenizer

    from zflora_jax.core.architecture import count_base
    from zflora_jax.core.presets import preset
    from zflora_jax.hf.config import to_hf_config
    from zflora_jax.hf.keys import hf_table
    from zflora_jax.hf.tensor_file import write_tensors
    from zflora_jax.hf.tokenizer import write_tokenizer
    from zflora_jax.reporting.files import write_json

    config, rng = preset("tiny").replace(**shape), np.random.default_rng(0)
    specs = {name: (place.hf_shape, "bfloat16") for name, place in hf_table(config).items()}

    def tensor(name: str) -> np.ndarray:
        shape, _ = specs[name]
        if len(shape) == 1:
            return np.ones(shape, ml_dtypes.bfloat16)
        draw = rng.standard_normal(shape, np.float32)
        draw *= np.float32(1.5 * shape[1] ** -0.5)
        return draw.astype(ml_dtypes.bfloat16)

    folder.mkdir(parents=True)
    write_tensors(folder / "model.safetensors", specs, tensor, {"format": "pt"})
    write_json(folder / "config.json", to_hf_config(config, "bfloat16", None))
    write_tokenizer(folder, byte_tokenizer())
    for split, numbers in (("train", range(8)), ("test", range(20, 22))):
        rows = [{"instruction": f"{i}+3=", "output": str(i + 3)} for i in numbers]
        (folder / f"{split}.json").write_text(json.dumps(rows), encoding="utf-8")
    return 4 * count_base(config)


def commands(folder: Path) -> list[list[str]]:
    run = ["--workdir", str(folder / "run")]
    return [
        ["train", *run, "--config", str(folder / "config.py")],
        ["eval", *run, "--out", str(folder / "eval")],
        ["generate", *run, "--prompt", "2+3=", "--max-new-tokens", "8"],
        ["export", *run, "--out", str(folder / "export")],
    ]


def start(folder: Path, processes: int, limit: int, argv: list[str]) -> list[dict[str, Any]]:
    """Run a command in `processes` processes, of two devices together.

    Returns:
      What each wrote to its peak file.

    Raises:
      RuntimeError: one of them failed; with the end of what it said.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    env = os.environ | {
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(2 // processes),
        "MALLOC_ARENA_MAX": "2",
        "MALLOC_MMAP_THRESHOLD_": "1048576",
        "ZFLORA_CACHE": str(folder.parent / "data"),
    }
    several = {
        "ZFLORA_COORDINATOR": f"127.0.0.1:{port}",
        "ZFLORA_NUM_PROCESSES": str(processes),
    }
    own = [sys.executable, __file__, "--worker", json.dumps(argv), str(folder), str(limit)]
    started = [
        subprocess.Popen(
            own,
            env=env | (several | {"ZFLORA_PROCESS_ID": str(i)} if processes > 1 else {}),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for i in range(processes)
    ]
    said = [process.communicate()[0] for process in started]
    if any(process.returncode for process in started):
        raise RuntimeError("\n\n".join([" ".join(argv), *(text[-6000:] for text in said)]))
    return [
        json.loads((folder / peak_file(argv[0], i)).read_text(encoding="utf-8"))
        for i in range(processes)
    ]


def measure(shape: dict[str, int], folder: Path, rlimit: bool) -> dict[str, Any]:
    """Train, evaluate, generate and export in two processes and in one, and compare them."""
    size = write_model(folder / "model", shape)
    found: dict[str, Any] = {"shape": shape, "float32_bytes": size, "rlimit": rlimit}
    for name, processes in (("two", 2), ("one", 1)):
        (folder / name).mkdir()
        model = str(folder / "model")  # its rows lie beside it
        config = CONFIG.format(model=model, data=model)
        (folder / name / "config.py").write_text(config, encoding="utf-8")
        limit = size if rlimit and processes > 1 else 0
        found[name] = []
        for argv in commands(folder / name):
            found[name].append(start(folder / name, processes, limit, argv))
            print(name, json.dumps(found[name][-1]), flush=True)
    worst = max(process["peak"] for command in found["two"] for process in command)
    if worst >= size:
        raise RuntimeError(f"a process needed {worst} bytes, the weights take {size}")
    return found | {"compared": compared(folder / "one", folder / "two")}


def compared(one: Path, two: Path) -> dict[str, Any]:
    """How far the two runs differ: losses relative, exported numbers over the largest of their
    tensor; whether answers agree.
    """
    import numpy as np
    from safetensors import safe_open

    def losses(folder: Path) -> list[float]:
        lines = (folder / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        return [json.loads(line)["loss"] for line in lines]

    def records(folder: Path) -> list[str]:
        [file] = (folder / "eval").glob("json-*.jsonl")
        return [
            json.loads(line)["output"] for line in file.read_text(encoding="utf-8").splitlines()
        ]

    def task(folder: Path) -> dict[str, Any]:
        [file] = (folder / "eval").glob("summary-*.json")
        return json.loads(file.read_text(encoding="utf-8"))["tasks"][0]

    a, b = np.asarray(losses(one)), np.asarray(losses(two))
    worst, equal, count = 0.0, 0, 0
    files = sorted(path.name for path in (one / "export").glob("*.safetensors"))
    for file in files:  # several above 5 GB
        with (
            safe_open(one / "export" / file, "np", backend="pread") as first,
            safe_open(two / "export" / file, "np", backend="pread") as second,
        ):
            for name in first.keys():  # noqa: SIM118 (a safe_open handle is no mapping)
                x, y = first.get_tensor(name), second.get_tensor(name)
                worst = max(worst, float(np.abs(x - y).max() / np.abs(x).max()))
                equal, count = equal + int((x == y).sum()), count + x.size
    ours, theirs = task(one)["loss"], task(two)["loss"]
    return {
        "losses": [a.tolist(), b.tolist()],
        "loss": float(np.abs(a - b).max() / np.abs(a).max()),
        "held_out": abs(ours - theirs) / ours,
        "answers": records(one) == records(two),
        "export": worst,
        "equal_share": equal / count,
    }


def page(result: dict[str, Any]) -> str:
    from zflora_jax.reporting.provenance import origin_line
    from zflora_jax.reporting.tables import markdown_table

    def gib(number: int) -> str:
        return f"{number / 2**30:.2f}"

    rows = [
        {
            "command": alone["command"],
            "one process, GiB": gib(alone["peak"]),
            "process 0 of two, GiB": gib(zero["peak"]),
            "process 1 of two, GiB": gib(other["peak"]),
            "one process, s": f"{alone['seconds']:.0f}",
            "two processes, s": f"{zero['seconds']:.0f}",
        }
        for (alone,), (zero, other) in zip(result["one"], result["two"], strict=True)
    ]
    shape, same = result["shape"], result["compared"]
    limited = (
        "the kernel refused each of the two more private memory than that (RLIMIT_DATA)"
        if result["rlimit"]
        else "no limit was set"
    )
    return f"""# Two processes, each with less memory than the model's weights

A Llama with random weights ({shape["num_layers"]} layers, {shape["hidden_size"]} wide) has
{gib(result["float32_bytes"])} GiB of float32 weights. Two processes on loopback, with one CPU
device each and `mesh.fsdp=2`, train (3 steps), evaluate, answer a prompt, fuse and export it. One
process with two devices does the same. The figures are the peaks of resident memory (VmHWM),
programs and files included; {limited}.

{markdown_table(rows, list(rows[0]))}

Two processes against one:

- losses of the training steps: relative difference at most {same["loss"]:.1e}; held-out loss:
  {same["held_out"]:.1e}
- generated answers: {"equal" if same["answers"] else "not equal"}
- exported numbers: at most {same["export"]:.1e} of the largest of their tensor apart;
  {100 * same["equal_share"]:.2f}% are equal bit for bit

The processes share 2 CPU cores, so the seconds say nothing about real hosts.

{origin_line(result["environment"])}
"""


def main() -> None:
    if sys.argv[1:2] == ["--worker"]:
        sys.exit(worker(json.loads(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4])))
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=SHAPE["num_layers"])
    parser.add_argument("--width", type=int, default=SHAPE["hidden_size"], help="a multiple of 128")
    parser.add_argument("--rlimit", action="store_true", help="have the kernel hold the limit")
    parser.add_argument("--folder", help="for models and runs (default: a temporary one)")
    parser.add_argument("--out", default="results/two_processes")
    args = parser.parse_args()
    os.environ["JAX_PLATFORMS"] = "cpu"
    from zflora_jax.reporting.files import write_result
    from zflora_jax.reporting.provenance import environment

    heads, env = args.width // 128, environment()
    shape = SHAPE | {"num_layers": args.layers, "hidden_size": args.width}
    shape |= {"intermediate_size": 4 * args.width, "num_heads": heads, "num_kv_heads": heads}
    folder = Path(args.folder or tempfile.mkdtemp(prefix="two-processes-"))
    try:
        result = {"environment": env, **measure(shape, folder.resolve(), args.rlimit)}
    finally:
        if not args.folder:
            shutil.rmtree(folder)
    write_result(args.out, result, page(result))
    print(page(result))


if __name__ == "__main__":
    main()
