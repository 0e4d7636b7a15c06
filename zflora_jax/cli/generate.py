"""`zflora generate`: answers one prompt, or those of a file."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from zflora_jax.cli.options import (
    CommandParser,
    add_mesh,
    add_processes,
    add_source,
    changes,
    join,
    mesh_asked,
)
from zflora_jax.cli.stopping import terminated
from zflora_jax.core.fields import require, to_dict
from zflora_jax.core.quantize_config import STORED
from zflora_jax.core.storage import as_path
from zflora_jax.core.textfile import decode, lines_of

if TYPE_CHECKING:
    from zflora_jax.core.model import Model
    from zflora_jax.core.run_config import RunConfig
    from zflora_jax.inference.generation_config import GenerationConfig

SUMMARY = "Answer one prompt, or those of a file."
_SAMPLING = (
    ("--max-new-tokens", int, 256, "N", "most tokens of an answer"),
    ("--temperature", float, 0.0, "T", "0 takes the likeliest token each time, above 0 samples"),
    ("--top-k", int, None, "K", "draw from the K likeliest tokens"),
    ("--top-p", float, None, "P", "draw from the likeliest tokens of probability P together"),
    ("--seed", int, 0, "N", "seed of the draws"),
    ("--batch-size", int, 16, "B", "lines of --file at one time"),
)


def add_options(parser: CommandParser) -> None:
    add_source(parser, "use")
    text = "a PEFT LoRA (directory or hub id) to fuse into --model"
    parser.option("--adapter", "DIR", text)
    text = "data type of --model (default: float32; a run has its own)"
    parser.option("--dtype", None, text, choices=["float32", "bfloat16"])
    text = (
        "storage type of the kernels of --model (default: keep, the blocks of a FILE.gguf of type"
        " Q8_0, Q4_0 or Q4_1, which a CPU decodes as floats; otherwise none, as floats, also for"
        " smollm2-135m)"
    )
    parser.option("--quantize", None, text, choices=STORED)
    prompts = parser.add_mutually_exclusive_group(required=True)
    prompts.add_argument("--prompt", metavar="TEXT", help="answer this")
    text = "answer every line of FILE, in batches; one JSON line each on stdout (- reads stdin)"
    prompts.add_argument("--file", metavar="FILE", help=text)
    text = "continue the text as it is, without the tokenizer's chat template"
    parser.add_argument("--plain", action="store_true", help=text)
    for name, kind, default, metavar, text in _SAMPLING:
        parser.option(name, metavar, text, kind, default=default)
    add_mesh(parser)
    add_processes(parser)


def run(args: argparse.Namespace) -> None:
    from zflora_jax.data.dates import today
    from zflora_jax.data.prompts import render
    from zflora_jax.inference.generation_config import GenerationConfig, Sampler
    from zflora_jax.inference.text import generate, stop_ids
    from zflora_jax.parallel.compile_cache import compile_cache
    from zflora_jax.parallel.distributed import from_process_0, on_main
    from zflora_jax.reporting.progress import announced
    from zflora_jax.training.workdir import read_config

    main = join(args)
    style, run = _style(args), read_config(args.workdir) if args.workdir else None
    sampler = Sampler(args.temperature, args.top_k, args.top_p)
    config = GenerationConfig(args.max_new_tokens, sampler, args.seed, args.batch_size)
    lines = from_process_0(on_main(lambda: _lines(args.file)))  # which may be its stdin
    date = from_process_0(run.data.date if run and run.data.date else today())
    with contextlib.ExitStack() as stack:
        if run:
            stack.enter_context(compile_cache(as_path(args.workdir) / "compile_cache"))
        model = _model_of(args, run)
        prompts = [args.prompt] if lines is None else [line for _, line in lines]
        texts = [render(model.tokenizer, style, prompt, date=date) for prompt in prompts]
        if style == "chat":
            config = config.stopping_at(stop_ids(model, style))
        if lines is not None:
            _answer_lines(model, lines, texts, config, main)
            return
        with announced("compiling and running the token loop", main):
            [answer] = generate(model, texts, config)
        if main:
            print(answer)


def _style(args: argparse.Namespace) -> str:
    """The style of the prompts. Raises ConfigError for options that exclude each other."""
    from zflora_jax.training.workdir import read_config, read_starts

    style = "plain" if args.plain else "chat"
    require(
        not (args.workdir and (args.adapter or args.dtype or args.quantize)),
        "--adapter, --dtype and --quantize go with --model; a run has its own.",
    )
    of_run = "--checkpoint chooses a saved step of a run: give its --workdir."
    require(not args.checkpoint or bool(args.workdir), of_run)
    if args.workdir and not args.plain:
        texts = any(start.get("plain_texts") for start in read_starts(args.workdir)[-1:])
        style = "plain" if texts else read_config(args.workdir).data.prompt_style
    return style


def _lines(file: str | None) -> list[tuple[int, str]] | None:
    """The prompts of --file, a line each: (number of the line, text)."""
    if file is None:
        return None
    folder = Path(file).is_dir()  # a pipe is read, too
    require(
        file == "-" or (Path(file).exists() and not folder),
        f"--file {file} {'is a directory' if folder else 'does not exist'}; give a text file with a"
        " prompt on every line, or - for stdin.",
    )
    data = sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes()
    lines = enumerate(lines_of(decode(data, f"--file {file}")), 1)
    found = [(number, line) for number, line in lines if line.strip()]
    require(bool(found), f"--file {file} holds no prompt; put one on every line.")
    return found


def _answer_lines(
    model: Model,
    numbered: list[tuple[int, str]],
    texts: list[str],
    config: GenerationConfig,
    main: bool,
) -> None:
    """Prints the answers of --file, batch after batch.

    Args:
      model: The model.
      numbered: The prompts, as `_lines` returns them.
      texts: The model's input for each prompt.
      config: Settings of generation.
      main: Whether this process prints.
    """
    from zflora_jax.inference.batching import check_prompts
    from zflora_jax.inference.text import encode_prompts, generate
    from zflora_jax.reporting.progress import progress_bar

    names = [f"line {number} of --file" for number, _ in numbered]
    ids, size = encode_prompts(model, texts), config.batch_size
    check_prompts(model, ids, config.max_new_tokens, names, "--max-new-tokens")
    quiet = not main or sys.stdout.isatty()
    with progress_bar(len(texts), "answering", not quiet) as advance, terminated():
        for start in range(0, len(texts), size):
            # Each batch has different draws.
            seeded = replace(config, seed=(config.seed + start) % 2**32)
            answers = generate(model, texts[start : start + size], seeded)
            for (_, line), answer in zip(numbered[start:], answers, strict=False):
                said = json.dumps({"prompt": line, "output": answer}, ensure_ascii=False)
                print(f"{said}\n" if main else "", end="", flush=True)
            advance(len(answers))


def _model_of(args: argparse.Namespace, run: RunConfig | None) -> Model:
    """The model of --workdir, or of --model and --adapter, packed as it is loaded."""
    from zflora_jax.adapters.fuse import fuse
    from zflora_jax.adapters.packing import pack_for_decode
    from zflora_jax.core.adapter_config import METHODS
    from zflora_jax.core.trees import fingerprint
    from zflora_jax.experiments.restore import load_fused
    from zflora_jax.hf.gguf.read import has_blocks
    from zflora_jax.hf.hub import locate
    from zflora_jax.hf.load import load_model
    from zflora_jax.hf.peft import load_peft
    from zflora_jax.nn.quantize_model import is_quantized, stored_text
    from zflora_jax.parallel.distributed import require_equal

    mesh = mesh_asked(changes(args), run)
    if run:
        model = load_fused(args.workdir, args.checkpoint, mesh=mesh, decode=True)[0]
        return pack_for_decode(model, donate=True)
    # The file's quantised blocks, if nothing is merged into them.
    own = args.quantize is None and args.model.endswith(".gguf") and not args.adapter
    keep = own and has_blocks(locate(args.model))
    dtype, how = args.dtype or "float32", args.quantize or ("keep" if keep else "none")
    # A tree per layer: each is packed in turn, so there is no second copy.
    model = load_model(args.model, dtype, scan_layers=False, mesh=mesh, quantize=how)
    if is_quantized(model):
        print(f"base: {stored_text(model)} (--quantize none: as floats)", file=sys.stderr)
    if args.adapter:
        require(
            model.adapter is None or not METHODS[model.adapter.method].widens,
            f"--model {args.model} has an adapter fused in already; give --adapter with its base.",
        )
        adapter, adapters = load_peft(args.adapter, model)
        require_equal({"adapter": to_dict(adapter), "its weights": fingerprint(adapters)})
        model = fuse(model, adapter, adapters, donate=True)
    return pack_for_decode(model, donate=True)
