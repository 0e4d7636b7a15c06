"""Configuration: one frozen dataclass per concern, each field declared, defaulted and checked here. `zflora_jax.fields` holds the machinery."""

from __future__ import annotations

import dataclasses
import datetime
import math
from dataclasses import dataclass, field
from typing import Any, Literal

from zflora_jax.fields import T, check_types, from_dict, nearest, require

Dtype = Literal["float32", "bfloat16", "float16"]
PromptStyle = Literal["chat", "alpaca", "alpaca-eval"]  # data.prompts says what each is
Precision = Literal["default", "high", "highest"]  # of float32 products: products.at_precision
Start = Literal["kaiming_uniform", "normal"]  # what an adapter's random blocks are drawn from


# --- the model ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RopeScaling:
    """Llama-3 frequency scaling (`rope_type: llama3`): low frequencies are divided by `factor`, a band between is interpolated."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int

    def __post_init__(self) -> None:
        check_types(self)
        require(self.factor >= 1, f"rope_scaling.factor={self.factor}: must be at least 1.")
        require(
            self.high_freq_factor > self.low_freq_factor > 0,
            f"rope_scaling: need high_freq_factor > low_freq_factor > 0, got {self.high_freq_factor} and {self.low_freq_factor}.",
        )
        original = self.original_max_position_embeddings
        require(original >= 1, f"rope_scaling.original_max_position_embeddings={original}: must be at least 1.")


@dataclass(frozen=True)
class LlamaConfig:
    """Shape and numerics of a Llama. A fused model is the same class with wider streams.

    `norm_dim` and `rope_dim` say how many leading channels of the residual stream and of a head belong to the base model: RMSNorm takes its
    mean over the first `norm_dim` channels, RoPE turns the first `rope_dim` dims of a head, and attention divides by sqrt(rope_dim).
    None means all of them (a base model).
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    max_position_embeddings: int = 2048
    tie_word_embeddings: bool = False
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int | None = None
    norm_dim: int | None = None
    rope_dim: int | None = None
    dtype: Dtype = "float32"  # of activations; kernels are cast to it where they are used
    scan_layers: bool = True  # one stacked block run by lax.scan (fast to compile) or one subtree per layer (fast to decode)
    packed: bool = False  # the layout for decode (see adapters.fuse.pack)
    remat: bool = False  # recompute each block in the backward pass instead of keeping its activations
    matmul_precision: Precision = "default"  # as TrainConfig's

    def __post_init__(self) -> None:
        check_types(self)
        for name in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_layers",
            "num_heads",
            "num_kv_heads",
            "head_dim",
            "max_position_embeddings",
        ):
            require(getattr(self, name) >= 1, f"{name}={getattr(self, name)}: must be at least 1.")
        require(
            self.num_heads % self.num_kv_heads == 0,
            f"num_heads={self.num_heads} is not a multiple of num_kv_heads={self.num_kv_heads}; grouped-query attention needs whole groups.",
        )
        for name in ("norm_dim", "rope_dim"):
            width = getattr(self, name)
            require(width is None or width >= 1, f"{name}={width}: must be at least 1, or None for all channels.")
        require(self.rotary_dim % 2 == 0, f"rope_dim={self.rotary_dim}: RoPE turns pairs of dims, so it must be even.")
        require(self.rotary_dim <= self.head_dim, f"rope_dim={self.rotary_dim} exceeds head_dim={self.head_dim}.")
        require(self.base_dim <= self.hidden_size, f"norm_dim={self.base_dim} exceeds hidden_size={self.hidden_size}.")
        require(self.rms_norm_eps > 0, f"rms_norm_eps={self.rms_norm_eps}: must be positive.")
        require(self.rope_theta > 0, f"rope_theta={self.rope_theta}: must be positive.")

    @property
    def base_dim(self) -> int:
        """Residual channels of the base model, d."""
        return self.norm_dim or self.hidden_size

    @property
    def rotary_dim(self) -> int:
        """Head dims of the base model, k."""
        return self.rope_dim or self.head_dim

    def replace(self, **changes: Any) -> LlamaConfig:
        return dataclasses.replace(self, **changes)


_LLAMA3 = {"vocab_size": 128256, "rope_theta": 500000.0, "max_position_embeddings": 131072, "bos_token_id": 128000}
_LLAMA32 = _LLAMA3 | {"rope_scaling": RopeScaling(32.0, 1.0, 4.0, 8192), "tie_word_embeddings": True, "eos_token_ids": (128001, 128008, 128009)}
_ROWS: dict[str, dict[str, Any]] = {
    "llama-3.2-1b": _LLAMA32 | {"hidden_size": 2048, "intermediate_size": 8192, "num_layers": 16, "num_heads": 32, "num_kv_heads": 8, "head_dim": 64},
    "llama-3.2-3b": _LLAMA32
    | {"hidden_size": 3072, "intermediate_size": 8192, "num_layers": 28, "num_heads": 24, "num_kv_heads": 8, "head_dim": 128},
    "llama-3.1-8b": _LLAMA3
    | {"rope_scaling": RopeScaling(8.0, 1.0, 4.0, 8192), "eos_token_ids": (128001, 128008, 128009)}
    | {"hidden_size": 4096, "intermediate_size": 14336, "num_layers": 32, "num_heads": 32, "num_kv_heads": 8, "head_dim": 128},
    "llama-2-7b": {"vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_layers": 32, "num_heads": 32, "num_kv_heads": 32}
    | {"head_dim": 128, "max_position_embeddings": 4096, "bos_token_id": 1, "eos_token_ids": (2,)},
    "smollm2-135m": {"vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_layers": 30, "num_heads": 9, "num_kv_heads": 3}
    | {"head_dim": 64, "max_position_embeddings": 8192, "rope_theta": 100000.0, "tie_word_embeddings": True}
    | {"bos_token_id": 1, "eos_token_ids": (2,), "pad_token_id": 2},
    "tiny": {"vocab_size": 259, "hidden_size": 64, "intermediate_size": 96, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "head_dim": 16}
    | {"max_position_embeddings": 512, "tie_word_embeddings": True, "bos_token_id": 256, "eos_token_ids": (257,), "pad_token_id": 258},
}
PRESETS: dict[str, LlamaConfig] = {name: LlamaConfig(**row) for name, row in _ROWS.items()}


def preset(name: str) -> LlamaConfig:
    """The LlamaConfig of a named model shape; ConfigError with the nearest name otherwise."""
    require(name in PRESETS, f"unknown model preset {name!r}: {nearest(name, PRESETS)}.")
    return PRESETS[name]


# --- the adapters -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Method:
    """One row of the table in docs/method.md: which streams are widened, or how a kernel is changed in place; how its random blocks start."""

    residual: bool = False
    heads: bool = False
    mlp: bool = False
    in_place: Literal["none", "lora", "ffa", "full"] = "none"
    start: Start | None = "normal"  # None: nothing is random


METHODS: dict[str, Method] = {
    "lora": Method(in_place="lora", start="kaiming_uniform"),
    "ffa": Method(in_place="ffa", start=None),
    "ffba": Method(heads=True, mlp=True),
    "zflora-minimal": Method(residual=True, mlp=True),
    "zflora-uniform": Method(residual=True, heads=True, mlp=True),
    "full": Method(in_place="full", start=None),
}


@dataclass(frozen=True)
class AdapterConfig:
    """An adapter: a method, its widths and the kernels it may touch. Widths are counted in channels.

    rank: r of LoRA and FFA, width of the residual state of the zFLoRA methods, and the divisor of the scale s = alpha / rank.
    alpha: None means 2 * rank (s = 2).
    mlp_rank: m, extra MLP units; None means `rank`. head_rank: e, extra dims per head, even; None means up to the next head size that attention
    kernels of servers know. head_scores: whether q and k are widened too (an added score term) or v and o alone.
    targets: "all", "attention", "mlp" or a regex over kernel names (q, k, v, o, gate, up, down), matched in full.
    init: what random blocks are drawn from: "kaiming_uniform", within +-1/sqrt(inputs), as PEFT
    starts LoRA; "normal", N(0, 1/inputs). None: the method's own (lora: kaiming_uniform, others:
    normal). ffa and full draw nothing.
    dropout: the share of inputs of LoRA's A that training leaves out, PEFT's lora_dropout; the
    others are divided by 1 - dropout. lora only.
    """

    method: str
    rank: int = 16
    alpha: float | None = None
    targets: str = "all"
    mlp_rank: int | None = None
    head_rank: int | None = None
    head_scores: bool = True
    init: Start | None = None
    dropout: float = 0.0

    def __post_init__(self) -> None:
        check_types(self)
        require(self.method in METHODS, f"unknown adapter method {self.method!r}: {nearest(self.method, METHODS)}.")
        row = METHODS[self.method]
        require(self.rank >= 1, f"adapter.rank={self.rank}: must be at least 1 (use the base model itself to run without an adapter).")
        require(self.alpha is None or 0 < self.alpha < math.inf, f"adapter.alpha={self.alpha}: must be positive, or None for 2 * rank.")
        for name, widened, stream in (("mlp_rank", row.mlp, "MLP"), ("head_rank", row.heads, "heads")):
            width = getattr(self, name)
            if width is not None:
                require(widened, f"adapter.{name}={width}: method {self.method!r} does not widen the {stream} stream; leave {name} unset.")
                require(width >= 0, f"adapter.{name}={width}: must be at least 0.")
        if self.head_rank is not None:
            require(
                self.head_rank % 2 == 0,
                f"adapter.head_rank={self.head_rank} is odd: Hugging Face rotates head dims in half-split pairs, so use an even width.",
            )
        require(
            self.init is None or row.start is not None,
            f"adapter.init={self.init!r}: method {self.method!r} draws nothing at random (ffa starts at zero, full "
            "at the base); leave init unset.",
        )
        require(
            0 <= self.dropout < 1,
            f"adapter.dropout={self.dropout}: a share of inputs, so at least 0 and below 1 (0 switches it off).",
        )
        require(
            self.dropout == 0 or row.in_place == "lora",
            f"adapter.dropout={self.dropout}: only method 'lora' has dropout, on the inputs of its A; method "
            f"{self.method!r} has none, leave it at 0.",
        )

    @property
    def scale(self) -> float:
        """s = alpha / rank."""
        return 2.0 if self.alpha is None else self.alpha / self.rank

    def explicit(self) -> AdapterConfig:
        """The same with `init` by its name where it was left to the method."""
        return self.replace(init=self.init or METHODS[self.method].start)

    def replace(self, **changes: Any) -> AdapterConfig:
        return dataclasses.replace(self, **changes)


def _is_date(text: str) -> bool:
    try:
        return datetime.date.fromisoformat(text).isoformat() == text
    except ValueError:
        return False


# --- a run --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DataConfig:
    """What is read and how it is batched. One step sees `batch_size` examples, in `accumulate` micro-batches."""

    task: str = "arithmetic"  # or a mixture: "boolq+arc_easy" (all rows of both), "boolq*1+arc_easy*3" (one row of boolq to three of arc_easy)
    data_dir: str | None = None  # where manual files live (JSON/JSONL tasks) or generated data is kept
    prompt_style: PromptStyle = "chat"
    batch_size: int = 8
    accumulate: int = 1
    lengths: tuple[int, ...] = (64, 128, 192, 256, 384, 512)  # a batch is padded to the smallest that holds it: one compilation each
    train_on_prompt: bool = False  # loss on the prompt too, as LLM-Adapters' train_on_inputs
    train_limit: int | None = None
    seed: int = 0
    packing: bool = False  # several examples in one row of the longest length, none seeing another; batch_size then counts rows, not examples
    date: str | None = None  # "2026-11-26": the day that a chat template is told; None: the day on which the run starts

    def __post_init__(self) -> None:
        check_types(self)
        require(self.batch_size >= 1, f"data.batch_size={self.batch_size}: must be at least 1.")
        require(self.accumulate >= 1, f"data.accumulate={self.accumulate}: must be at least 1.")
        require(
            self.batch_size % self.accumulate == 0,
            f"data.batch_size={self.batch_size} is not a multiple of data.accumulate={self.accumulate}; micro-batches must be equal.",
        )
        require(
            len(self.lengths) > 0 and list(self.lengths) == sorted(set(self.lengths)) and self.lengths[0] >= 1,
            f"data.lengths={list(self.lengths)}: expected increasing positive lengths, e.g. [128, 256].",
        )
        require(self.train_limit is None or self.train_limit >= 1, f"data.train_limit={self.train_limit}: must be at least 1, or None for all rows.")
        require(self.seed >= 0, f"data.seed={self.seed}: must be at least 0.")
        require(
            self.date is None or _is_date(self.date),
            f"data.date={self.date!r}: expected a day as YYYY-MM-DD, e.g. 2026-11-26, or None for the day on which the run starts.",
        )


@dataclass(frozen=True)
class OptimConfig:
    """AdamW with warm-up, then a decay to `final_lr_fraction` of the peak.

    loraplus_ratio: learning rate of the blocks that write to the base's channels (lora_b, backward) over that of the others (LoRA+, Hayou et al.
    2024; carried over to the zFLoRA methods by this project).
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

    def __post_init__(self) -> None:
        check_types(self)
        require(0 < self.learning_rate < math.inf, f"optim.learning_rate={self.learning_rate}: must be positive and finite.")
        require(self.warmup_steps >= 0, f"optim.warmup_steps={self.warmup_steps}: must be at least 0.")
        require(0 <= self.final_lr_fraction <= 1, f"optim.final_lr_fraction={self.final_lr_fraction}: must be within 0..1.")
        require(0 <= self.weight_decay < math.inf, f"optim.weight_decay={self.weight_decay}: must be at least 0.")
        for name in ("b1", "b2"):
            require(0 <= getattr(self, name) < 1, f"optim.{name}={getattr(self, name)}: a decay rate of Adam's averages, so at least 0 and below 1.")
        require(0 < self.loraplus_ratio < math.inf, f"optim.loraplus_ratio={self.loraplus_ratio}: must be positive (1.0: the same rate everywhere).")
        require(self.eps > 0, f"optim.eps={self.eps}: must be positive.")
        require(self.clip_norm is None or self.clip_norm > 0, f"optim.clip_norm={self.clip_norm}: must be positive, or None to switch clipping off.")


@dataclass(frozen=True)
class TrainConfig:
    """The loop. `seed` draws the adapters' initial values; the data order has its own seed (data.seed)."""

    steps: int = 100
    seed: int = 0
    dtype: Literal["float32", "bfloat16"] = "float32"
    remat: bool = False
    loss_chunk: int = 256  # positions whose logits exist at one time
    log_every: int = 10
    eval_every: int | None = None  # None: at the end only
    save_every: int | None = 50  # None: at the end only
    keep: int = 2  # the newest checkpoints
    keep_best: bool = False  # and the one with the lowest validation loss
    report_to: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ("tensorboard",)  # besides metrics.jsonl
    # Of float32 products, in training, evaluation and decode alike. TPUs and GPUs with TF32 round their
    # operands at "default", which is what jax is set to; "highest" is float32 throughout.
    matmul_precision: Precision = "default"

    def __post_init__(self) -> None:
        check_types(self)
        for name in ("steps", "loss_chunk", "log_every", "keep"):
            require(getattr(self, name) >= 1, f"train.{name}={getattr(self, name)}: must be at least 1.")
        require(self.seed >= 0, f"train.seed={self.seed}: must be at least 0.")
        for name in ("eval_every", "save_every"):
            value = getattr(self, name)
            require(value is None or value >= 1, f"train.{name}={value}: must be at least 1, or None for the end only.")
        each, saved = self.eval_every, self.save_every
        require(
            not self.keep_best or (each is not None and saved is not None and saved % each == 0),
            f"train.keep_best=True needs the loss of every checkpoint: set train.eval_every to a divisor of train.save_every "
            f"(they are {each} and {saved}).",
        )


@dataclass(frozen=True)
class MeshConfig:
    """How many devices along each axis of the mesh (see sharding). The numbers of a run do not depend on it, up to float rounding."""

    data: int = 1
    fsdp: int = 1
    tensor: int = 1

    def __post_init__(self) -> None:
        check_types(self)
        for name in ("data", "fsdp", "tensor"):
            require(getattr(self, name) >= 1, f"mesh.{name}={getattr(self, name)}: must be at least 1.")


@dataclass(frozen=True)
class EvalConfig:
    """Held-out loss, generated answers, and log-likelihoods where a task has options."""

    split: Literal["validation", "test"] = "test"  # "validation" is what settings are chosen on
    limit: int | None = 200  # examples; None for all
    batch_size: int = 16
    max_new_tokens: int = 128
    num_beams: int = 1  # 1 is greedy
    prompt_style: PromptStyle | None = None  # of generation and likelihood; None means data.prompt_style
    clean_only: bool = False  # score only rows whose question is not in the training data; limit then counts those
    max_prompt_tokens: int | None = None  # documents are cut so that their prompt fits; None means the context less max_new_tokens
    loss: bool = True
    generate: bool = True
    likelihood: bool = True  # where a task has options
    seed: int = 0  # of the bootstrap

    def __post_init__(self) -> None:
        check_types(self)
        require(self.limit is None or self.limit >= 1, f"eval.limit={self.limit}: must be at least 1, or None for all examples.")
        for name in ("batch_size", "max_new_tokens", "num_beams"):
            require(getattr(self, name) >= 1, f"eval.{name}={getattr(self, name)}: must be at least 1.")
        limit = self.max_prompt_tokens
        require(limit is None or limit >= 1, f"eval.max_prompt_tokens={limit}: must be at least 1, or None for what the context holds.")
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
            f"optim.warmup_steps={self.optim.warmup_steps} does not leave a step at full rate in train.steps={self.train.steps}; lower warmup_steps.",
        )
        require(
            not self.train.keep_best or self.eval.split == "validation",
            "train.keep_best=True chooses by the held-out loss: set eval.split=validation, so that the test split stays unseen.",
        )
        split = METHODS[self.adapter.method].in_place not in ("ffa", "full")
        require(
            split or self.optim.loraplus_ratio == 1,
            f"optim.loraplus_ratio={self.optim.loraplus_ratio}: method {self.adapter.method!r} has no blocks of two kinds; leave it at 1.",
        )
        parts, micro = self.mesh.data * self.mesh.fsdp, self.data.batch_size // self.data.accumulate
        require(
            micro % parts == 0,
            f"mesh.data={self.mesh.data} x mesh.fsdp={self.mesh.fsdp} does not divide the {micro} rows of a micro-batch "
            f"(data.batch_size={self.data.batch_size} / data.accumulate={self.data.accumulate}); make the batch a multiple of {parts}.",
        )


# --- what files hold ----------------------------------------------------------------------------------------------


def from_file(cls: type[T], values: dict[str, Any], name: str = "") -> T:
    """`from_dict` of what a run, a record or an export wrote down; a setting that is younger than the
    file is what it was when the file was written.

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
