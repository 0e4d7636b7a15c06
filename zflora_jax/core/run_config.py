"""Settings of a run: one frozen dataclass per concern, each field declared, defaulted, explained
and checked here. `core.settings` reads the string under a field for the help of the command line.
"""

from __future__ import annotations

import datetime
import math
import re
from dataclasses import dataclass, field, replace
from typing import Annotated, Literal

from zflora_jax.core.adapter_config import METHODS, OF_BASE, AdapterConfig
from zflora_jax.core.fields import (
    Bounds,
    Count,
    Natural,
    NotNegative,
    Positive,
    Seed,
    Share,
    Text,
    check_types,
    checked_names,
    require,
)
from zflora_jax.core.model_config import LlamaConfig, Precision, Remat
from zflora_jax.core.quantize_config import QuantizeConfig as QuantizeConfig


def _is_date(text: str) -> bool:
    try:
        return datetime.date.fromisoformat(text).isoformat() == text
    except ValueError:
        return False


def _is_span(text: str) -> bool:
    return re.fullmatch(r"[1-9]\d*:[1-9]\d*", text) is not None


def _increase(lengths: tuple[int, ...]) -> bool:
    return lengths != () and [*lengths] == sorted({*lengths}) and lengths[0] >= 1


Day = Annotated[str, Bounds("a day as YYYY-MM-DD, e.g. 2026-11-26", _is_date)]
Lengths = Annotated[tuple[int, ...], Bounds("increasing lengths, e.g. [128, 256]", _increase)]
Fraction = Annotated[float, Bounds("from 0 to 1", lambda x: 0 <= x <= 1)]
PromptStyle = Literal["chat", "alpaca", "alpaca-eval", "plain"]
RowFormat = Literal[
    "preference",
    "messages",
    "conversations",
    "prompt-completion",
    "instruction",
    "question",
    "text",
]


@checked_names
@dataclass(frozen=True)
class DataConfig:
    """The examples of a run, and their batching."""

    task: str = "arithmetic"
    """A task, or a mixture of tasks: boolq+arc_easy takes all rows of both, boolq*1+arc_easy*3 one
    row of boolq to three of arc_easy."""
    data_dir: Text | None = None
    """Directory of files that a task reads. Task rows also reads a file (JSON, JSONL, CSV or
    Parquet) or a dataset by name: hub:OWNER/NAME, tfds:NAME."""
    prompt_style: PromptStyle = "chat"
    """Form of the prompts. chat: the tokenizer's chat template; alpaca: LLM-Adapters' prompt in the
    whitespace of its training script; alpaca-eval: in that of its evaluation script; plain: texts
    as they are."""
    batch_size: Count = 8
    """Examples per step; rows per step with packing."""
    grad_accum_steps: Count = 1
    """Micro-batches that a step is divided into."""
    bucket_lengths: Lengths = (64, 128, 192, 256, 384, 512)
    """Lengths in tokens. A batch is padded to the smallest that holds it; each is compiled once."""
    train_on_prompt: bool = False
    """Put loss on the prompt too, as LLM-Adapters' train_on_inputs does."""
    train_limit: Count | None = None
    """Rows of the training split that are used; None means all."""
    seed: Natural = 0
    """Seed of the data order."""
    packing: bool = False
    """Put several examples into one row of the longest length; they do not see each other."""
    date: Day | None = None
    """Today's date for chat templates, as YYYY-MM-DD; None means the day on which the run
    starts."""
    row_format: RowFormat | None = None
    """Format of the rows of task rows; None means that it follows from their columns."""

    def __post_init__(self) -> None:
        check_types(self, "data")
        require(
            self.batch_size % self.grad_accum_steps == 0,
            f"data.batch_size={self.batch_size} is not a multiple of"
            f" data.grad_accum_steps={self.grad_accum_steps}; micro-batches must be equal.",
        )

    @property
    def micro_batch_size(self) -> int:
        """Rows of a micro-batch."""
        return self.batch_size // self.grad_accum_steps


@checked_names
@dataclass(frozen=True)
class OptimConfig:
    """An optimizer with a warm-up, then a decay of the learning rate."""

    learning_rate: Positive = 1e-3
    """Peak of the learning rate."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Form of the decay after the warm-up."""
    warmup_steps: Natural = 10
    """Steps in which the learning rate rises linearly to its peak; fewer than train.steps."""
    final_lr_fraction: Fraction = 0.0
    """Learning rate after the last step, as a share of its peak."""
    weight_decay: NotNegative = 0.0
    """Decoupled weight decay, for every optimizer."""
    b1: Share = 0.9
    """Decay rate of the first moment; the momentum of sgd."""
    b2: Share = 0.999
    """Decay rate of the second moment; for lion, of its momentum."""
    eps: Positive = 1e-8
    """Term that adamw adds to its denominator."""
    clip_norm: Positive | None = 1.0
    """Largest global norm of the gradient; None switches clipping off."""
    loraplus_ratio: Positive = 1.0
    """Learning rate of the blocks that write to the base's channels (lora_b, backward) over that of
    the others: LoRA+ (Hayou et al. 2024), carried over to the zflora methods by this project."""
    optimizer: str = "adamw"
    """adamw, lion, adafactor or sgd, a row of training.optim.OPTIMIZERS. adamw and lion use b1 and
    b2, sgd uses b1 as its momentum, and only adamw uses eps."""

    def __post_init__(self) -> None:
        check_types(self, "optim")


@checked_names
@dataclass(frozen=True)
class TrainConfig:
    """The training loop: its length, number formats, evaluation, checkpoints and logs."""

    steps: Count | None = None
    """Optimizer steps. None means 100, or as many as train.epochs takes."""
    epochs: Positive | None = None
    """Epochs: passes over the training rows, in place of train.steps. They are rounded up to whole
    steps, which are recorded. With task weights, an epoch has as many rows as all tasks."""
    seed: Seed = 0
    """Seed of the adapter's initial values and of dropout; the data order has data.seed."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Data type of the base's weights and of activations."""
    remat: Remat = "dots"
    """Gradient checkpointing: the values of a layer kept for the backward pass. none keeps all,
    dots products, block the layer's input; block computes layers twice and needs least memory."""
    loss: Literal["cross_entropy", "dpo"] = "cross_entropy"
    """The loss to minimise: cross_entropy of the next token, or dpo, direct preference optimization
    (arXiv 2305.18290), on pairs of a chosen and a rejected answer, with the base as reference."""
    dpo_beta: Positive = 0.1
    """DPO's beta: a larger one keeps the answers closer to the base's."""
    loss_chunk: Count = 512
    """Positions of a device with logits at one time: at most a quarter of them, or 256 if more."""
    log_every: Count = 10
    """Steps between two records of the metrics."""
    eval_every: Count | None = None
    """Steps between two evaluations of the held-out loss; None means at the end only."""
    save_every: Count | None = 50
    """Steps between two checkpoints; None means at the end only."""
    max_to_keep: Count = 2
    """Newest checkpoints that are kept."""
    keep_best: bool = False
    """Also keep the checkpoint with the lowest validation loss. Needs eval.split=validation and
    train.eval_every a divisor of train.save_every."""
    profile: Annotated[str, Bounds("STEP:COUNT, e.g. 10:3", _is_span)] | None = None
    """Steps that are traced into WORKDIR/profile, as STEP:COUNT: the first step and their number.
    TensorBoard (XProf) and ui.perfetto.dev show the trace."""
    report_to: tuple[str, ...] = ("tensorboard",)
    """Trackers that get the metrics besides metrics.jsonl: tensorboard, wandb, the rows of
    reporting.trackers.TRACKERS."""
    matmul_precision: Precision = "default"
    """Precision of float32 products in training, evaluation and decode. At default, TPUs and GPUs
    with TF32 round the operands; highest is float32 throughout."""
    scan_layers: bool = True
    """One compiled layer, in a loop. False compiles each layer: on TPUs faster by the compiler's
    estimate, for more memory and minutes of compiling."""
    _either = ("steps", "epochs")  # `override` sets one in place of the other

    def __post_init__(self) -> None:
        check_types(self, "train")
        if self.steps is None and self.epochs is None:
            object.__setattr__(self, "steps", 100)
        each, saved = self.eval_every, self.save_every
        require(
            not self.keep_best or (each is not None and saved is not None and saved % each == 0),
            "train.keep_best=True needs the loss of every checkpoint: set train.eval_every to a"
            f" divisor of train.save_every (they are {each} and {saved}).",
        )

    @property
    def pairs(self) -> bool:
        """True if rows are pairs of answers, which the loss compares with the base's."""
        return self.loss == "dpo"

    def applied_to(self, config: LlamaConfig) -> LlamaConfig:
        """`config` with the dtype, remat and matmul_precision of these settings."""
        return config.replace(
            dtype=self.dtype, remat=self.remat, matmul_precision=self.matmul_precision
        )


@checked_names
@dataclass(frozen=True)
class EvalConfig:
    """Held-out loss, generated answers, and log-likelihoods where a task has options."""

    split: Literal["validation", "test"] = "test"
    """Split that is scored; choose settings on validation."""
    limit: Count | None = 200
    """Examples per task; None means all."""
    batch_size: Count = 16
    """Examples per batch."""
    max_new_tokens: Count = 128
    """Most tokens of a generated answer."""
    prompt_style: PromptStyle | None = None
    """Form of the prompts of generation and likelihood; None means data.prompt_style."""
    clean_only: bool = False
    """Score only rows whose question is not in the training data; limit then counts those."""
    max_prompt_tokens: Count | None = None
    """Most tokens of a prompt; longer documents are cut to fit. None means the context minus
    max_new_tokens."""
    loss: bool = True
    """Compute the held-out loss."""
    generate: bool = True
    """Generate answers and score them."""
    likelihood: bool = True
    """Score options by their likelihood, where a task has options."""
    seed: Seed = 0
    """Seed of the bootstrap."""

    def __post_init__(self) -> None:
        check_types(self, "eval")


@checked_names
@dataclass(frozen=True)
class MeshConfig:
    """Devices along each axis of the mesh. A run's results do not depend on it, up to float
    rounding.
    """

    data: Count = 1
    """Copies of the model, each with its own rows of the batch."""
    fsdp: Count = 1
    """Devices that the rows of the batch and the weights are divided over."""
    tensor: Count = 1
    """Devices that heads, MLP units and the vocabulary are divided over."""

    def __post_init__(self) -> None:
        check_types(self, "mesh")

    @property
    def devices(self) -> int:
        """Number of devices in the mesh."""
        return self.data * self.fsdp * self.tensor

    @property
    def row_parts(self) -> int:
        """Number of parts that the rows of a batch are divided into."""
        return self.data * self.fsdp


@checked_names
@dataclass(frozen=True)
class RunConfig:
    """Everything that decides a run's results, written next to its checkpoints as config.json."""

    model: Text = "smollm2-135m"
    """The base: a preset, a hub id, or path or URL (s3://, gs://) of a Hugging Face directory, an
    export or a .gguf file."""
    adapter: AdapterConfig = field(default_factory=lambda: AdapterConfig("zflora-minimal"))
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    quantize: QuantizeConfig = field(default_factory=QuantizeConfig)

    def __post_init__(self) -> None:
        check_types(self)
        steps = self.train.steps
        require(
            steps is None or self.optim.warmup_steps < steps,
            f"optim.warmup_steps={self.optim.warmup_steps} does not leave a step at full rate in"
            f" train.steps={steps}; lower warmup_steps.",
        )
        require(
            not self.train.keep_best or self.eval.split == "validation",
            "train.keep_best=True chooses by the held-out loss: set eval.split=validation, so that"
            " the test split stays unseen.",
        )
        method = METHODS[self.adapter.method]
        require(
            method.in_place not in ("ffa", "full") or self.optim.loraplus_ratio == 1,
            f"optim.loraplus_ratio={self.optim.loraplus_ratio}: method {self.adapter.method!r} has"
            " only one type of block; leave it at 1.",
        )
        require(
            method.in_place != "full" or not self.quantize.active,
            "method 'full' trains the base's floats, and quantize.* stores them as codes, which"
            " have no gradient: leave quantize.* at none, or train an adapter.",
        )
        if self.train.pairs:
            self._check_dpo()
        parts, micro = self.mesh.row_parts, self.data.micro_batch_size
        require(
            micro % parts == 0,
            f"mesh.data={self.mesh.data} x mesh.fsdp={self.mesh.fsdp} does not divide the {micro}"
            f" rows of a micro-batch (data.batch_size={self.data.batch_size} /"
            f" data.grad_accum_steps={self.data.grad_accum_steps}); make the batch a multiple of"
            f" {parts}.",
        )

    def _check_dpo(self) -> None:
        found = {
            "data.packing=True": (self.data.packing, "a row is one pair already"),
            "data.train_on_prompt=True": (
                self.data.train_on_prompt,
                "both answers have one prompt",
            ),
            f"adapter.init={self.adapter.init}": (
                self.adapter.init in OF_BASE,
                "it changes the base, which is the reference",
            ),
        }
        for setting, (given, why) in found.items():
            require(not given, f"{setting} does not go with train.loss=dpo: {why}. Leave it out.")

    @property
    def steps(self) -> int:
        """Optimizer steps; ConfigError before `in_steps` has counted those of train.epochs."""
        text = f"train.epochs={self.train.epochs}: its steps depend on the training rows, which are"
        text += " not read here. Give train.steps; `zflora data` shows the steps of an epoch."
        require(self.train.steps is not None, text)
        return self.train.steps  # type: ignore[return-value]

    def in_steps(self, rows: int) -> RunConfig:
        """The run with the train.steps that train.epochs needs for `rows` training rows."""
        given, epochs, batch = self.train.steps, self.train.epochs, self.data.batch_size
        # 0.7 epochs of 10 rows, 7.000000000000001, are 7 rows.
        steps = given if epochs is None else max(1, math.ceil(epochs * rows / batch - 1e-9))
        require(
            given in (None, steps),
            f"train.steps={given} contradicts train.epochs={epochs}, which of {rows} rows, {batch}"
            f" a step, are {steps} steps. Give one of the two, and set the other to None.",
        )
        return replace(self, train=replace(self.train, steps=steps))
