"""Converts an export into a file for LiteRT (phones, small computers) and checks its logits.

Command: ENV/bin/python tools/litert.py DIR FILE.litertlm [--quant int8 | f32] [--context N]

DIR is an export of `zflora export --format hf --dtype float32`, for int8 with `--eps 0.0625`: int8
has one scale per output channel, which a smaller eps would coarsen. ENV is an environment with
`pip install 'litert-torch>=0.10,<0.11' tensorflow-cpu` (4 GB with a CPU build of torch), which
needs nothing of this project. FILE.litertlm holds the tokenizer and the chat template too, for
LiteRT-LM; FILE.tflite is the model alone, with the signatures prefill_N and decode. The logits of
the file, one token at a time, are compared with those of DIR in transformers.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path

import numpy as np

RECIPES = {"f32": None, "int8": "dynamic_wi8_afp32"}  # names in ai-edge-quantizer
PREFILL = 128  # tokens of a prompt that are read at once
TEXT = (
    "The residual stream of a transformer is read by every layer and written by every layer. An"
    " adapter that adds channels to it changes 12 + 30 = 42 kernels, but no kernel more is run.\n"
)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("export", type=Path, metavar="DIR")
    parser.add_argument(
        "out", type=Path, metavar="FILE", help="*.litertlm or *.tflite; must be new"
    )
    parser.add_argument("--quant", choices=list(RECIPES), default="int8")
    help_ = "tokens of prompt and answer; attention runs over all of them for every token"
    parser.add_argument("--context", type=int, default=1024, metavar="N", help=help_)
    args = parser.parse_args()
    if args.out.suffix not in (".litertlm", ".tflite"):
        parser.error(f"{args.out}: the name of a LiteRT file ends in .litertlm or .tflite.")
    if args.out.exists():
        parser.error(f"{args.out} exists; choose another path, or move it away.")
    if not (args.export / "config.json").is_file():
        parser.error(f"{args.export} has no config.json; give an export of --format hf.")
    return args


def convert(export: Path, folder: Path, args: argparse.Namespace) -> tuple[str, str]:
    """Converts an export by the steps of litert-torch 0.10, one by one, for the path of the model.
    Returns the paths of the file asked for and of the *.tflite in it.
    """
    from litert_torch.generative.export_hf import export as steps
    from litert_torch.generative.export_hf.core import (
        export_lib,
        exportable_module,
        litert_lm_builder,
    )

    config = exportable_module.ExportableModuleConfig(
        model=str(export),
        output_dir=str(folder),
        work_dir=str(folder),
        prefill_lengths=[min(PREFILL, args.context)],
        cache_length=args.context,
        quantization_recipe=RECIPES[args.quant],
    )
    tasks = [export_lib.export_text_prefill_decode_model]
    if args.out.suffix == ".litertlm":
        tasks += [export_lib.export_tokenizer, litert_lm_builder.package_model]
    made = steps.run_export_tasks(tasks, config)
    model = made.prefill_decode_model_path
    return (model if args.out.suffix == ".tflite" else made.litert_lm_model_path), model


def file_logits(path: str, ids: list[int]) -> np.ndarray:
    """Logits [T, V] after each of T tokens, by the decode signature of a *.tflite file."""
    from ai_edge_litert.interpreter import Interpreter

    run = Interpreter(model_path=path, num_threads=1).get_signature_runner("decode")
    details = run.get_input_details()
    caches = {
        name: np.zeros(found["shape"], found["dtype"])
        for name, found in details.items()
        if name.startswith("kv_cache")
    }
    shape, rows = details["mask"]["shape"], []
    for at, token in enumerate(ids):
        mask = np.where(np.arange(shape[-1]) <= at, 0, np.finfo(np.float32).min)
        found = run(
            tokens=np.full(details["tokens"]["shape"], token, np.int32),
            input_pos=np.array([at], np.int32),
            mask=mask.astype(np.float32).reshape(shape),
            **caches,
        )
        rows.append(found.pop("logits").reshape(-1))
        caches = {name: found[name] for name in caches}
    return np.stack(rows)


def compare(export: Path, path: str, context: int) -> None:
    """Prints how far the logits of a *.tflite file are from those of the export."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    ids = AutoTokenizer.from_pretrained(export)(TEXT)["input_ids"][:context]
    model = AutoModelForCausalLM.from_pretrained(export, dtype=torch.float32).eval()
    with torch.no_grad():
        want = model(torch.tensor([ids])).logits[0].double()
    found = torch.tensor(file_logits(path, ids)).double()
    gap = (found - want).abs().max() / want.abs().max()
    kl = torch.nn.functional.kl_div(found.log_softmax(-1), want.softmax(-1), reduction="batchmean")
    same = (found.argmax(-1) == want.argmax(-1)).double().mean()
    print(
        f"{len(ids)} tokens against transformers: max |dlogit| {gap:.1e} of the largest logit, KL"
        f" {kl:.1e} nats, {same:.0%} of the likeliest tokens the same"
    )


def main() -> None:
    args = arguments()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.out.parent) as folder:
        made, model = convert(args.export, Path(folder), args)
        compare(args.export, model, args.context)
        os.replace(made, args.out)
    print(f"{args.out}: {args.out.stat().st_size / 1e6:.1f} MB, {args.quant}")


if __name__ == "__main__":
    main()
