# The public names and where they live: the one list, read at run time and by type checkers.
from .adapters.fuse import fuse as fuse, swap as swap, unfuse as unfuse
from .adapters.init import (
    init_adapters as init_adapters,
    plain_lora as plain_lora,
    split_base as split_base,
)
from .adapters.kernel_adapter import LowRank as LowRank, Widening as Widening
from .adapters.methods import add_method as add_method
from .adapters.packing import pack_for_decode as pack_for_decode
from .adapters.widths import (
    count_params as count_params,
    round_widths as round_widths,
)
from .core.adapter_config import AdapterConfig as AdapterConfig
from .core.errors import (
    CheckpointError as CheckpointError,
    NonFiniteError as NonFiniteError,
    Preempted as Preempted,
)
from .core.fields import ConfigError as ConfigError, override as override
from .core.model import Model as Model
from .core.model_config import LlamaConfig as LlamaConfig
from .core.presets import PRESETS as PRESETS, preset as preset
from .core.run_config import (
    DataConfig as DataConfig,
    EvalConfig as EvalConfig,
    OptimConfig as OptimConfig,
    QuantizeConfig as QuantizeConfig,
    RunConfig as RunConfig,
    TrainConfig as TrainConfig,
)
from .data.mixture import TrainedOn as TrainedOn
from .evaluation.export_gap import export_gap as export_gap
from .evaluation.task import evaluate as evaluate, evaluate_tasks as evaluate_tasks
from .experiments.base import load_base as load_base
from .experiments.export import export_run as export_run
from .experiments.grid import sweep as sweep
from .experiments.restore import fuse_trained as fuse_trained, load_run as load_run
from .experiments.setup import held_out as held_out, split_loss as split_loss
from .experiments.train import train as train
from .hf.gguf.write import save_gguf as save_gguf
from .hf.load import load_model as load_model
from .hf.peft import load_peft as load_peft, save_peft as save_peft
from .hf.save import save_hf as save_hf
from .hf.slices import save_slices as save_slices
from .inference.decode import generate_tokens as generate_tokens
from .inference.generation_config import GenerationConfig as GenerationConfig, Sampler as Sampler
from .inference.likelihood import option_log_likelihoods as option_log_likelihoods
from .inference.text import generate as generate
from .nn.kv_cache import KVCache as KVCache, init_cache as init_cache
from .nn.llama import Llama as Llama, forward as forward, random_model as random_model
from .nn.quantize_model import (
    dequantize_model as dequantize_model,
    quantize_model as quantize_model,
)
from .ops.linear import project as project
from .parallel.sharding import make_mesh as make_mesh
from .reporting.files import atomic_write as atomic_write
from .reporting.plots import colour_of as colour_of, loss_curves as loss_curves, styled as styled
from .reporting.provenance import environment as environment
from .reporting.tables import markdown_table as markdown_table
from .training.lock import BusyError as BusyError, locked as locked

__version__: str
