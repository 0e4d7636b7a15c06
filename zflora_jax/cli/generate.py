"""`zflora generate`: prompts from the command line, a file or a conversation."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zflora_jax.cli.inputs import changes, mesh_asked
from zflora_jax.cli.options import CommandParser, add_mesh, add_processes, add_source, join
from zflora_jax.cli.stopping import terminated
from zflora_jax.core.fields import ConfigError, require
from zflora_jax.core.quantize_config import STORED
from zflora_jax.core.storage import as_path
from zflora_jax.core.textfile import decode, lines_of

if TYPE_CHECKING:
    from zflora_jax.core.model import Model
    from zflora_jax.inference.generation_config import Sampler

SUMMARY = (
    "Answer prompts: one, those of a file, or a conversation on the terminal; text is shown as it"
    " comes."
)


def add_options(parser: CommandParser) -> None:
    add_source(parser, "use")
    parser.add_argument(
        "--adapter", metavar="DIR", help="a PEFT LoRA, a directory or hub id, to fuse into --model"
    )
    parser.add_argument(
        "--dtype",
        choices=["float32", "bfloat16"],
        help="of --model (default: float32; a run has its own)",
    )
    parser.add_argument(
        "--quantize",
        choices=STORED,
        help="how the kernels of --model are stored (default: keep, as they are, of a FILE.gguf"
        " with blocks of Q8_0, Q4_0 or Q4_1, which a CPU decodes as floats; else none, as numbers,"
        " also of smollm2-135m)",
    )
    prompts = parser.add_mutually_exclusive_group()
    prompts.add_argument("--prompt", metavar="TEXT", help="answer this")
    prompts.add_argument(
        "--file",
        metavar="FILE",
        help="answer every line of FILE, in batches; one JSON line each on stdout (- reads stdin)",
    )
    parser.add_argument(
        "--plain",
        action="store_true",
        help="continue the text as it is, without the tokenizer's chat template",
    )
    parser.add_argument("--system", metavar="TEXT", help="the system's turn of a conversation")
    _add_sampling_options(parser)
    add_mesh(parser)
    add_processes(parser)


def _add_sampling_options(parser: CommandParser) -> None:
    parser.add_argument(
        "--max-new-tokens",
        type=int,
        default=256,
        metavar="N",
        help="at most so many tokens an answer (default: 256)",
    )
    parser.add_argument(
        "--temperature",
        type=float,
        default=0.0,
        metavar="T",
        help="0 takes the likeliest token each time (default), above 0 draws",
    )
    parser.add_argument("--top-k", type=int, metavar="K", help="draw from the K likeliest tokens")
    parser.add_argument(
        "--top-p",
        type=float,
        metavar="P",
        help="draw from the likeliest tokens that together have probability P",
    )
    parser.add_argument(
        "--seed", type=int, default=0, metavar="N", help="of what is drawn (default: 0)"
    )
    parser.add_argument(
        "--batch-size",
        type=int,
        default=16,
        metavar="B",
        help="lines of --file at one time (default: 16)",
    )


def run(args: argparse.Namespace) -> None:
    from jax import process_count

    from zflora_jax.data.dates import today
    from zflora_jax.inference.generation_config import Sampler
    from zflora_jax.parallel.compile_cache import compile_cache
    from zflora_jax.parallel.distributed import from_process_0, on_main
    from zflora_jax.training.workdir import read_config, read_starts

    require(
        not (args.plain and args.system),
        "--system is a turn of a conversation; leave --plain out, or put the text into the prompt.",
    )
    require(
        not (args.workdir and (args.adapter or args.dtype or args.quantize)),
        "--adapter, --dtype and --quantize go with --model; a run has its own.",
    )
    require(
        not (args.checkpoint and not args.workdir), "--checkpoint is of a run: give its --workdir."
    )
    require(
        not (args.plain and args.prompt is None and args.file is None),
        "--plain continues a text: give it by --prompt or --file.",
    )
    main = join(args)
    sampler = Sampler(args.temperature, args.top_k, args.top_p)
    lines = from_process_0(on_main(lambda: _lines(args.file)))  # which may be its stdin
    # Prompts of a run are written as it was trained.
    data = read_config(args.workdir).data if args.workdir else None
    started = read_starts(args.workdir)[-1:] if args.workdir else []
    texts = args.plain or any(start.get("plain_texts") for start in started)
    style = "plain" if texts else data.prompt_style if data else "chat"
    require(
        style == "chat" or args.system is None,
        f"--system is a turn of a conversation; this run was trained on {_of_style(style)}.",
    )
    talks = args.prompt is None and lines is None
    require(
        not talks or style == "chat",
        f"a run trained on {_of_style(style)} holds no conversation: give --prompt or --file.",
    )
    require(
        not talks or process_count() == 1,
        "several processes hold no conversation: give --prompt or --file.",
    )
    with (
        compile_cache(as_path(args.workdir) / "compile_cache")
        if args.workdir
        else contextlib.nullcontext()
    ):
        day = from_process_0((data and data.date) or today())
        _generate(args, _model_of(args), style, lines, sampler, day, main)


def _of_style(style: str) -> str:
    return "plain texts" if style == "plain" else f"prompts of data.prompt_style={style!r}"


def _generate(
    args: argparse.Namespace,
    model: Model,
    style: str,
    lines: list[tuple[int, str]] | None,
    sampler: Sampler,
    date: str,
    main: bool,
) -> None:
    """Answer --file (`lines`), --prompt or a conversation. date: what a template is told; main:
    whether this process prints.
    """
    from zflora_jax.inference.text import converse, stream

    settings: Any = {
        "max_new_tokens": args.max_new_tokens,
        "sampler": sampler,
        "seed": args.seed,
        "date": date,
    }
    if lines is not None:
        require(
            args.system is None, "--system goes with --prompt or a conversation, not with --file."
        )
        _answer_lines(args, model, style, lines, settings, main)
        return

    def say(text: str) -> None:
        if main:
            print(text, end="", flush=True)

    opening = [{"role": "system", "content": args.system}] if args.system else []
    if args.prompt is not None:
        turns = [*opening, {"role": "user", "content": args.prompt}]
        asked = turns if style == "chat" else _written(model, style, args.prompt)
        for piece in stream(model, asked, **settings):
            say(piece)
        say("\n")
        return
    if sys.stdin.isatty():
        print(
            "A line is a turn. /reset forgets the conversation, /quit or the end of input ends it,"
            " Ctrl-C stops an answer.",
            file=sys.stderr,
        )
    converse(model, _typed(), say, system=args.system, **settings)


def _written(model: Model, style: str, prompt: str) -> str:
    from zflora_jax.data.prompts import render

    return prompt if style in ("plain", "chat") else render(model.tokenizer, style, prompt)


def _answer_lines(
    args: argparse.Namespace,
    model: Model,
    style: str,
    lines: list[tuple[int, str]],
    settings: dict[str, Any],
    main: bool,
) -> None:
    """Answer the lines of --file. Answers are printed in their order, each as soon as those before
    it are there; when an error or a signal ends the work, also those behind one that is missing.
    """
    from zflora_jax.inference.batching import check_prompts
    from zflora_jax.inference.text import encode_prompts, generate as generate_texts
    from zflora_jax.reporting.progress import progress_bar

    prompts = [_written(model, style, line) for _, line in lines]
    form: Any = {"chat": style == "chat", "date": settings["date"]}
    check_prompts(
        model,
        encode_prompts(model, prompts, **form),
        args.max_new_tokens,
        [f"--file {args.file}, line {number}" for number, _ in lines],
        "--max-new-tokens",
    )
    answers: dict[int, str] = {}
    waiting = 0

    def show(i: int) -> None:
        if main:
            said = {"prompt": lines[i][1], "output": answers[i]}
            print(json.dumps(said, ensure_ascii=False), flush=True)
        del answers[i]  # not before: a signal may come in between

    with progress_bar(len(lines), "answering", main and not sys.stdout.isatty()) as advance:

        def keep(i: int, answer: str) -> None:
            nonlocal waiting
            answers[i] = answer
            advance(1)
            while waiting in answers:
                show(waiting)
                waiting += 1

        with terminated():
            try:
                given = settings | form | {"batch_size": args.batch_size}
                generate_texts(model, prompts, on_answer=keep, **given)
            finally:
                for i in sorted(answers):
                    show(i)


def _model_of(args: argparse.Namespace) -> Model:
    """What --workdir or --model, with --adapter, name."""
    from zflora_jax.adapters.fuse import fuse
    from zflora_jax.adapters.packing import pack_for_decode, split_layers
    from zflora_jax.core.adapter_config import METHODS
    from zflora_jax.experiments.restore import load_fused
    from zflora_jax.hf.gguf.read import has_blocks
    from zflora_jax.hf.load import load_model, locate
    from zflora_jax.hf.peft import load_peft
    from zflora_jax.nn.quantize_model import is_quantized, stored_text
    from zflora_jax.training.workdir import read_config

    mesh = mesh_asked(changes(args), read_config(args.workdir) if args.workdir else None)
    if args.workdir:
        model = load_fused(args.workdir, args.checkpoint, mesh=mesh, decode=True)[0]
        return pack_for_decode(split_layers(model), donate=True)
    # The file's own blocks where nothing is merged into them.
    own = args.quantize is None and args.model.endswith(".gguf") and not args.adapter
    keep = own and has_blocks(locate(args.model)[0])
    dtype, how = args.dtype or "float32", args.quantize or ("keep" if keep else "none")
    # A tree per layer (`split_layers`), of which each is packed in turn: there is no second copy.
    model = load_model(args.model, dtype, scan_layers=False, mesh=mesh, quantize=how)
    if is_quantized(model):
        print(f"base: {stored_text(model)} (--quantize none: as floats)", file=sys.stderr)
    if args.adapter:
        require(
            model.adapter is None or not METHODS[model.adapter.method].widens,
            f"--model {args.model} has an adapter fused in already; give --adapter with its base.",
        )
        model = fuse(model, *load_peft(args.adapter, model), donate=True)
    return pack_for_decode(model, donate=True)


def _lines(file: str | None) -> list[tuple[int, str]] | None:
    """The prompts of --file with the numbers of their lines."""
    if file is None:
        return None
    if file != "-" and not Path(file).is_file():
        raise ConfigError(
            f"--file {file} does not exist; give a text file with a prompt on every line, or - for"
            " stdin."
        )
    text = decode(
        sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes(), f"--file {file}"
    )
    lines = [(number, line) for number, line in enumerate(lines_of(text), 1) if line.strip()]
    require(bool(lines), f"--file {file} holds no prompt; put one on every line.")
    return lines


def _typed() -> Iterator[str]:
    """Lines from the terminal (with its editing keys) or a pipe, which may begin with a byte order
    mark. Ctrl-C at an empty prompt is forgotten.
    """
    if sys.stdin.isatty():
        import readline  # noqa: F401 (input() then edits lines and remembers them)
    while True:
        try:
            yield input("> " if sys.stdin.isatty() else "").removeprefix("\ufeff")
        except KeyboardInterrupt:
            print(file=sys.stderr)
        except EOFError:
            return
