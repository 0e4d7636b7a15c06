"""An export as a GGUF file for llama.cpp: its own conversion script, and what that script leaves out.

Command: python tools/to_gguf.py EXPORT OUT.gguf --llama-cpp DIR     (DIR: llama.cpp's sources; --python: one that has what its script needs)
Exports of ffba and zflora-uniform have heads wider than the base's, and say by `rope_type: longrope` which dims RoPE turns. llama.cpp reads such
factors of a Llama, but its script (of llama-cpp-python 0.3.36) does not write them: the file would load and compute something else. They are added
here, as the tensors rope_factors_long and rope_factors_short.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np


class ConversionError(RuntimeError):
    """llama.cpp's script ended with an error; its last lines."""


def convert(export: Path, out: Path, llama_cpp: Path, python: str = sys.executable, outtype: str = "f32") -> None:
    """Write `out` whole or not at all. outtype: f32, f16 or bf16, as llama.cpp's script takes it."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent) as folder:
        plain, whole = Path(folder, "plain.gguf"), Path(folder, "whole.gguf")
        command = [python, str(llama_cpp / "convert_hf_to_gguf.py"), str(export), "--outtype", outtype, "--outfile", str(plain)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise ConversionError(
                f"{llama_cpp.name}'s convert_hf_to_gguf.py ended with {done.returncode}:\n" + "\n".join(done.stderr.splitlines()[-5:])
            )
        rope = json.loads((export / "config.json").read_text(encoding="utf-8")).get("rope_parameters") or {}
        if rope.get("rope_type") == "longrope":
            add_tensors(plain, whole, {f"rope_factors_{kind}.weight": np.asarray(rope[f"{kind}_factor"], np.float32) for kind in ("long", "short")})
            plain = whole
        os.replace(plain, out)


def add_tensors(source: Path, target: Path, extra: dict[str, np.ndarray]) -> None:
    """Copy a GGUF file with tensors added."""
    from gguf import GGUFReader, GGUFValueType, GGUFWriter

    reader = GGUFReader(source)
    writer = GGUFWriter(target, arch=reader.fields["general.architecture"].contents())
    for field in reader.fields.values():
        if field.name.startswith("GGUF.") or field.name == "general.architecture":
            continue  # the writer makes them
        kind = field.types[0]
        writer.add_key_value(field.name, field.contents(), kind, field.types[-1] if kind == GGUFValueType.ARRAY else None)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    for name, values in extra.items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("export", type=Path, metavar="EXPORT", help="a directory written by `zflora export`")
    parser.add_argument("out", type=Path, metavar="OUT.gguf")
    parser.add_argument("--llama-cpp", required=True, type=Path, metavar="DIR", help="llama.cpp's sources")
    parser.add_argument("--python", default=sys.executable, metavar="FILE", help="the Python that runs its script (default: this one)")
    parser.add_argument("--outtype", default="f32", choices=["f32", "f16", "bf16"])
    args = parser.parse_args()
    for path in (args.export / "config.json", args.llama_cpp / "convert_hf_to_gguf.py"):
        if not path.is_file():
            parser.error(f"{path} does not exist")
    convert(args.export, args.out, args.llama_cpp, args.python, args.outtype)


if __name__ == "__main__":
    main()
