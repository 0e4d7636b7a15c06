"""Settings of a run: one frozen dataclass per concern, each field declared, defaulted and checked
here.
"""

from __future__ import annotations

import datetime
import math
from dataclasses import dataclass, field
from typing import Any, Literal

from zflora_jax.core.adapter_config import METHODS, AdapterConfig
from zflora_jax.core.fields import T, check_types, from_dict, renamed, require
from zflora_jax.core.model_config import Precision

PromptStyle = Literal["chat", "alpaca", "alpaca-eval"]  # data.prompts says what each is


def _is_date(text: str) -> bool:
    try:
        return datetime.date.fromisoformat(text).isoformat() == text
    except ValueError:
        return False


@renamed(accumulate="grad_accum_steps", lengths="bucket_lengths")
@dataclass(frozen=True)
class DataConfig:
    """What is read and how it is batched. One step sees `batch_size` examples, in
    `grad_accum_steps` micro-batches.
    """

    # Or a mixture: "boolq+arc_easy" (all rows of both), "boolq*1+arc_easy*3" (one row of boolq to
    # three of arc_easy)
    task: str = "arithmetic"
    data_dir: str | None = (
        None  # where manual files live (JSON/JSONL tasks) or generated data is kept
    )
    prompt_style: PromptStyle = "chat"
    batch_size: int = 8
    grad_accum_steps: int = 1
    # A batch is padded to the smallest that holds it: one compilation each.
    bucket_lengths: tuple[int, ...] = (
        64,
        128,
        192,
        256,
        384,
        512,
    )
    train_on_prompt: bool = False  # loss on the prompt too, as LLM-Adapters' train_on_inputs
    train_limit: int | None = None
    seed: int = 0
    # Several examples in one row of the longest length, none seeing another; batch_size then counts
    # rows, not examples
    packing: bool = False
    date: str | None = (
        # "2026-11-26": the day that a chat template is told; None: the day on which the run starts
        None
    )

    def __post_init__(self) -> None:
        check_types(self)
        require(self.batch_size >= 1, f"data.batch_size={self.batch_size}: must be at least 1.")
        require(
            self.grad_accum_steps >= 1,
            f"data.grad_accum_steps={self.grad_accum_steps}: must be at least 1.",
        )
        require(
            self.batch_size % self.grad_accum_steps == 0,
            f"data.batch_size={self.batch_size} is not a multiple of"
            f" data.grad_accum_steps={self.grad_accum_steps}; micro-batches must be equal.",
        )
        require(
            len(self.bucket_lengths) > 0
            and list(self.bucket_lengths) == sorted(set(self.bucket_lengths))
            and self.bucket_lengths[0] >= 1,
            f"data.bucket_lengths={list(self.bucket_lengths)}: expected increasing positive"
            " lengths, e.g. [128, 256].",
        )
        require(
            self.train_limit is None or self.train_limit >= 1,
            f"data.train_limit={self.train_limit}: must be at least 1, or None for all rows.",
        )
        require(self.seed >= 0, f"data.seed={self.seed}: must be at least 0.")
        require(
            self.date is None or _is_date(self.date),
            f"data.date={self.date!r}: expected a day as YYYY-MM-DD, e.g. 2026-11-26, or None for"
            " the day on which the run starts.",
        )


@dataclass(frozen=True)
class OptimConfig:
    """An optimizer with warm-up, then a decay to `final_lr_fraction` of the peak.

    loraplus_ratio: learning rate of the blocks that write to the base's channels (lora_b, backward)
    over that of the others (LoRA+, Hayou et al. 2024; carried over to the zFLoRA methods by this
    project).
    """

    learning_rate: float = 1e-3
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_steps: int = 10
    final_lr_fraction: float = 0.0
    weight_decay: float = 0.0
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    clip_norm: float | None = 1.0
    loraplus_ratio: float = 1.0
    # adamw, lion, adafactor or sgd: a row of training.optim.OPTIMIZERS. b1 and b2 are of adamw and
    # lion, b1 is the momentum of sgd, and eps is of adamw.
    optimizer: str = "adamw"

    def __post_init__(self) -> None:
        check_types(self)
        require(
            0 < self.learning_rate < math.inf,
            f"optim.learning_rate={self.learning_rate}: must be positive and finite.",
        )
        require(
            self.warmup_steps >= 0, f"optim.warmup_steps={self.warmup_steps}: must be at least 0."
        )
        require(
            0 <= self.final_lr_fraction <= 1,
            f"optim.final_lr_fraction={self.final_lr_fraction}: must be within 0..1.",
        )
        require(
            0 <= self.weight_decay < math.inf,
            f"optim.weight_decay={self.weight_decay}: must be at least 0.",
        )
        for name in ("b1", "b2"):
            require(
                0 <= getattr(self, name) < 1,
                f"optim.{name}={getattr(self, name)}: a decay rate of Adam's averages, so at least"
                " 0 and below 1.",
            )
        require(
            0 < self.loraplus_ratio < math.inf,
            f"optim.loraplus_ratio={self.loraplus_ratio}: must be positive (1.0: the same rate"
            " everywhere).",
        )
        require(self.eps > 0, f"optim.eps={self.eps}: must be positive.")
        require(
            self.clip_norm is None or self.clip_norm > 0,
            f"optim.clip_norm={self.clip_norm}: must be positive, or None to switch clipping off.",
        )


@renamed(keep="max_to_keep")
@dataclass(frozen=True)
class TrainConfig:
    """The loop. `seed` draws the adapters' initial values; the data order has its own seed
    (data.seed).
    """

    steps: int = 100
    seed: int = 0
    dtype: Literal["float32", "bfloat16"] = "float32"
    remat: bool = False
    loss_chunk: int = 256  # positions whose logits exist at one time
    log_every: int = 10
    eval_every: int | None = None  # None: at the end only
    save_every: int | None = 50  # None: at the end only
    max_to_keep: int = 2  # the newest checkpoints
    keep_best: bool = False  # and the one with the lowest validation loss
    # Besides metrics.jsonl: tensorboard, wandb, trackio, the rows of reporting.trackers.TRACKERS.
    report_to: tuple[str, ...] = ("tensorboard",)
    # Of float32 products, in training, evaluation and decode alike. TPUs and GPUs with TF32 round
    # their operands at "default", which is what jax is set to; "highest" is float32 throughout.
    matmul_precision: Precision = "default"

    def __post_init__(self) -> None:
        check_types(self)
        for name in ("steps", "loss_chunk", "log_every", "max_to_keep"):
            require(
                getattr(self, name) >= 1, f"train.{name}={getattr(self, name)}: must be at least 1."
            )
        require(self.seed >= 0, f"train.seed={self.seed}: must be at least 0.")
        for name in ("eval_every", "save_every"):
            value = getattr(self, name)
            require(
                value is None or value >= 1,
                f"train.{name}={value}: must be at least 1, or None for the end only.",
            )
        each, saved = self.eval_every, self.save_every
        require(
            not self.keep_best or (each is not None and saved is not None and saved % each == 0),
            "train.keep_best=True needs the loss of every checkpoint: set train.eval_every to a"
            f" divisor of train.save_every (they are {each} and {saved}).",
        )


@dataclass(frozen=True)
class MeshConfig:
    """How many devices along each axis of the mesh (see sharding). The numbers of a run do not
    depend on it, up to float rounding.
    """

    data: int = 1
    fsdp: int = 1
    tensor: int = 1

    def __post_init__(self) -> None:
        check_types(self)
        for name in ("data", "fsdp", "tensor"):
            require(
                getattr(self, name) >= 1, f"mesh.{name}={getattr(self, name)}: must be at least 1."
            )


@dataclass(frozen=True)
class EvalConfig:
    """Held-out loss, generated answers, and log-likelihoods where a task has options."""

    split: Literal["validation", "test"] = "test"  # "validation" is what settings are chosen on
    limit: int | None = 200  # examples; None for all
    batch_size: int = 16
    max_new_tokens: int = 128
    num_beams: int = 1  # 1 is greedy
    prompt_style: PromptStyle | None = (
        None  # of generation and likelihood; None means data.prompt_style
    )
    clean_only: bool = (
        False  # score only rows whose question is not in the training data; limit then counts those
    )
    max_prompt_tokens: int | None = (
        # Documents are cut so that their prompt fits; None means the context less max_new_tokens
        None
    )
    loss: bool = True
    generate: bool = True
    likelihood: bool = True  # where a task has options
    seed: int = 0  # of the bootstrap

    def __post_init__(self) -> None:
        check_types(self)
        require(
            self.limit is None or self.limit >= 1,
            f"eval.limit={self.limit}: must be at least 1, or None for all examples.",
        )
        for name in ("batch_size", "max_new_tokens", "num_beams"):
            require(
                getattr(self, name) >= 1, f"eval.{name}={getattr(self, name)}: must be at least 1."
            )
        limit = self.max_prompt_tokens
        require(
            limit is None or limit >= 1,
            f"eval.max_prompt_tokens={limit}: must be at least 1, or None for what the context"
            " holds.",
        )
        require(self.seed >= 0, f"eval.seed={self.seed}: must be at least 0.")


@dataclass(frozen=True)
class RunConfig:
    """Everything that decides a run's numbers, written beside its checkpoints as config.json."""

    model: str = "smollm2-135m"
    adapter: AdapterConfig = field(default_factory=lambda: AdapterConfig("zflora-minimal"))
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)

    def __post_init__(self) -> None:
        check_types(self)
        require(
            self.optim.warmup_steps < self.train.steps,
            f"optim.warmup_steps={self.optim.warmup_steps} does not leave a step at full rate in"
            f" train.steps={self.train.steps}; lower warmup_steps.",
        )
        require(
            not self.train.keep_best or self.eval.split == "validation",
            "train.keep_best=True chooses by the held-out loss: set eval.split=validation, so that"
            " the test split stays unseen.",
        )
        split = METHODS[self.adapter.method].in_place not in ("ffa", "full")
        require(
            split or self.optim.loraplus_ratio == 1,
            f"optim.loraplus_ratio={self.optim.loraplus_ratio}: method {self.adapter.method!r} has"
            " no blocks of two kinds; leave it at 1.",
        )
        parts, micro = (
            self.mesh.data * self.mesh.fsdp,
            self.data.batch_size // self.data.grad_accum_steps,
        )
        require(
            micro % parts == 0,
            f"mesh.data={self.mesh.data} x mesh.fsdp={self.mesh.fsdp} does not divide the {micro}"
            f" rows of a micro-batch (data.batch_size={self.data.batch_size} /"
            f" data.grad_accum_steps={self.data.grad_accum_steps}); make the batch a multiple of"
            f" {parts}.",
        )


# --- what files hold ------------------------------------------------------------------------------


def from_file(cls: type[T], values: dict[str, Any], name: str = "") -> T:
    """`from_dict` of what a run, a record or an export wrote down; a setting that is younger than
    the file is what it was when the file was written.

    LoRA's A was normal until `AdapterConfig.init` could say otherwise.

    Args:
      cls: a dataclass of this module. values: its fields as JSON has them. name: for messages.

    Raises:
      ConfigError: unknown keys, wrong types.
    """

    def adapter(values: Any) -> Any:
        old = isinstance(values, dict) and values.get("method") == "lora" and "init" not in values
        return values | {"init": "normal"} if old else values

    if cls is AdapterConfig:
        values = adapter(values)
    elif cls is RunConfig and isinstance(values, dict) and "adapter" in values:
        values = values | {"adapter": adapter(values["adapter"])}
    return from_dict(cls, values, name)
