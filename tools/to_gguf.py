"""Converts an export to a GGUF file with llama.cpp's own script, and adds what the script omits.

Command: python tools/to_gguf.py EXPORT OUT.gguf --llama-cpp DIR
(DIR: llama.cpp's sources; --python: an interpreter with the packages that its script needs)
Exports of ffba and zflora-uniform have wider heads than the base; `rope_type: longrope` says which
dims RoPE rotates. llama.cpp reads such factors of a Llama, but its script (of llama-cpp-python
0.3.36) does not write them, so the file would compute something else. This script adds them, as the
tensors rope_factors_long and rope_factors_short.

llama-quantize leaves a tensor in F16 if its rows are not a multiple of a block of 32 numbers: 181
of 272 tensors of a fused SmolLM2-135M (hidden 594), which makes the file three times as slow as the
base's. So this script fills hidden and MLP widths with channels of zeros to a multiple of 32, and
scales norm gains and epsilon so that the function stays the same. K-quants (Q4_K, ...) have blocks
of 256: --multiple 256. --multiple 1 leaves the widths alone.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

# Which axes of a tensor [outputs, inputs] run over the residual stream and over the MLP units.
HIDDEN = {
    **dict.fromkeys(
        ("token_embd", "output", "attn_q", "attn_k", "attn_v", "ffn_gate", "ffn_up"), 1
    ),
    **dict.fromkeys(("attn_output", "ffn_down", "attn_norm", "ffn_norm", "output_norm"), 0),
}
UNITS = {"ffn_gate": 0, "ffn_up": 0, "ffn_down": 1}


class ConversionError(RuntimeError):
    """llama.cpp's script failed (the message has the last lines of its output), or llama.cpp could
    not read the result.
    """


def convert(
    export: Path,
    out: Path,
    llama_cpp: Path,
    python: str = sys.executable,
    outtype: str = "f32",
    multiple: int = 32,
) -> str:
    """Convert an export. The file appears whole or not at all.

    Args:
      export: a directory of `zflora export`.
      out: the GGUF file to write.
      llama_cpp: the directory of llama.cpp's sources.
      python: the interpreter that runs its script.
      outtype: "f32", "f16" or "bf16".
      multiple: hidden and MLP widths are filled with zeros up to a multiple of it.

    Returns:
      Text that says which widths were filled.

    Raises:
      ConversionError: llama.cpp's script fails, or `multiple` is below 1.
    """
    if multiple < 1:
        raise ConversionError(
            f"--multiple {multiple}: must be at least 1 (32 for most formats, 256 for K-quants, 1"
            " to fill nothing)."
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent) as folder:
        plain, whole = Path(folder, "plain.gguf"), Path(folder, "whole.gguf")
        command = [python, str(llama_cpp / "convert_hf_to_gguf.py"), str(export)]
        command += ["--outtype", outtype, "--outfile", str(plain)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise ConversionError(
                f"{llama_cpp.name}'s convert_hf_to_gguf.py ended with {done.returncode}:\n"
                + "\n".join(done.stderr.splitlines()[-5:])
            )
        config = json.loads((export / "config.json").read_text(encoding="utf-8"))
        rope, extra = config.get("rope_parameters") or {}, {}
        if rope.get("rope_type") == "longrope":
            if config["model_type"] not in ("llama", "mistral"):
                raise ConversionError(
                    f"{export}: heads wider than the base's need RoPE factors, which llama.cpp does"
                    f" not read for {config['model_type']}. Export a method that leaves the heads"
                    " alone (zflora-minimal, lora, ffa, full)."
                )
            extra = {
                f"rope_factors_{kind}.weight": np.asarray(rope[f"{kind}_factor"], np.float32)
                for kind in ("long", "short")
            }
        widths = {name: config[name] for name in ("hidden_size", "intermediate_size")}
        filled = {name: -(-width // multiple) * multiple for name, width in widths.items()}
        if extra or filled != widths:
            rewrite(plain, whole, extra, config, filled)
            plain = whole
        os.replace(plain, out)
    return _said(config, filled, multiple)


def _said(config: dict[str, Any], filled: dict[str, int], multiple: int) -> str:
    changes = [
        f"{name} {config[name]} -> {width}"
        for name, width in filled.items()
        if config[name] != width
    ]
    lines = [
        (
            f"filled with zeros to multiples of {multiple}: {', '.join(changes)}"
            if changes
            else "widths as they are"
        )
    ]
    rows = {**filled, "the heads together": config["num_attention_heads"] * config["head_dim"]}
    odd = [f"{name} ({width})" for name, width in rows.items() if width % 32]
    if odd:
        lines.append(
            f"no multiple of 32, so llama-quantize leaves what reads it in F16: {', '.join(odd)}"
        )
    if any(width % 256 for width in rows.values()):
        lines.append(
            "K-quants have blocks of 256 and fall back to others where a width is no multiple of it"
            " (--multiple 256)"
        )
    return "\n".join(lines)


def rewrite(
    source: Path,
    target: Path,
    extra: dict[str, np.ndarray],
    config: dict[str, Any],
    filled: dict[str, int],
) -> None:
    """Copy a GGUF file, add tensors and fill widths with zeros.

    Args:
      source: the file that llama.cpp's script has written.
      target: the file to write.
      extra: name -> tensor to add.
      config: config.json of the export.
      filled: "hidden_size" and "intermediate_size" of the target.
    """
    from gguf import GGUFReader, GGUFValueType, GGUFWriter

    reader = GGUFReader(source)
    # The norms take their mean square over more channels.
    share = config["hidden_size"] / filled["hidden_size"]
    architecture = reader.fields["general.architecture"].contents()
    same = filled == {name: config[name] for name in filled}
    changed = {} if same else _changed(architecture, config, filled)
    writer = GGUFWriter(target, arch=architecture)
    for field in reader.fields.values():
        if (
            field.name.startswith("GGUF.")
            or field.name == "general.architecture"
            or field.name in changed
        ):
            continue  # the writer makes them
        kind = field.types[0]
        writer.add_key_value(
            field.name,
            field.contents(),
            kind,
            field.types[-1] if kind == GGUFValueType.ARRAY else None,
        )
    for name, (value, kind) in changed.items():
        writer.add_key_value(name, value, kind)
    for tensor in reader.tensors:
        module = tensor.name.removesuffix(".weight").split(".")[-1]
        data = tensor.data
        if changed and (module in HIDDEN or module in UNITS):
            data = _filled(data, module, config, filled, int(tensor.shape[0]))
            data = data * np.float32(math.sqrt(share)) if module.endswith("norm") else data
        writer.add_tensor(tensor.name, np.ascontiguousarray(data), raw_dtype=tensor.tensor_type)
    for name, values in extra.items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _changed(
    architecture: str, config: dict[str, Any], filled: dict[str, int]
) -> dict[str, tuple[Any, Any]]:
    """Metadata key -> (value, kind), for a file with the widths `filled`."""
    from gguf import GGUFValueType

    share = config["hidden_size"] / filled["hidden_size"]
    whole = {
        "embedding_length": filled["hidden_size"],
        "feed_forward_length": filled["intermediate_size"],
        # Without these llama.cpp divides the hidden width by the number of heads.
        "attention.key_length": config["head_dim"],
        "attention.value_length": config["head_dim"],
    }
    changed: dict[str, tuple[Any, Any]] = {
        f"{architecture}.{key}": (value, GGUFValueType.UINT32) for key, value in whole.items()
    }
    eps = (config["rms_norm_eps"] * share, GGUFValueType.FLOAT32)
    return changed | {f"{architecture}.attention.layer_norm_rms_epsilon": eps}


def _filled(
    data: np.ndarray, module: str, config: dict[str, Any], filled: dict[str, int], inputs: int
) -> np.ndarray:
    """Pad `data` with zeros up to the widths `filled`.

    bfloat16 tensors come as bytes, so several numbers of the array may be one of the tensor.
    """
    padding = [[0, 0] for _ in data.shape]
    for axes, name in ((HIDDEN, "hidden_size"), (UNITS, "intermediate_size")):
        if (axis := axes.get(module)) is not None:
            each = data.shape[-1] // inputs if axis == data.ndim - 1 else 1
            padding[axis][1] = (filled[name] - config[name]) * each
    return np.pad(data, padding)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "export", type=Path, metavar="EXPORT", help="a directory written by `zflora export`"
    )
    parser.add_argument("out", type=Path, metavar="OUT.gguf")
    parser.add_argument(
        "--llama-cpp", required=True, type=Path, metavar="DIR", help="llama.cpp's sources"
    )
    parser.add_argument(
        "--python",
        default=sys.executable,
        metavar="FILE",
        help="the Python that runs its script (default: this one)",
    )
    parser.add_argument("--outtype", default="f32", choices=["f32", "f16", "bf16"])
    parser.add_argument(
        "--multiple",
        type=int,
        default=32,
        metavar="N",
        help="fill widths to a multiple of N (default: 32; 1: leave them)",
    )
    args = parser.parse_args()
    for path in (args.export / "config.json", args.llama_cpp / "convert_hf_to_gguf.py"):
        if not path.is_file():
            parser.error(f"{path} does not exist")
    print(convert(args.export, args.out, args.llama_cpp, args.python, args.outtype, args.multiple))


if __name__ == "__main__":
    main()
