# The public names and where they live: the one list, read at run time and by type checkers.
from .adapters.fuse import fuse as fuse
from .adapters.fuse import unfuse as unfuse
from .adapters.init import init_adapters as init_adapters
from .adapters.methods import count_params as count_params
from .adapters.methods import rank_for_budget as rank_for_budget
from .adapters.packing import pack as pack
from .adapters.swapping import swap as swap
from .adapters.tasks import (
    pad_adapters as pad_adapters,
)
from .adapters.tasks import (
    rows_of as rows_of,
)
from .adapters.tasks import (
    stack_tasks as stack_tasks,
)
from .core.adapter_config import AdapterConfig as AdapterConfig
from .core.fields import ConfigError as ConfigError
from .core.model import Model as Model
from .core.model_config import PRESETS as PRESETS
from .core.model_config import LlamaConfig as LlamaConfig
from .core.model_config import preset as preset
from .core.run_config import (
    DataConfig as DataConfig,
)
from .core.run_config import (
    EvalConfig as EvalConfig,
)
from .core.run_config import (
    OptimConfig as OptimConfig,
)
from .core.run_config import (
    RunConfig as RunConfig,
)
from .core.run_config import (
    TrainConfig as TrainConfig,
)
from .evaluation.export_gap import export_gap as export_gap
from .evaluation.scorecard import evaluate as evaluate
from .evaluation.scorecard import evaluate_tasks as evaluate_tasks
from .experiments.compare import compare_methods as compare_methods
from .experiments.comparison import Comparison as Comparison
from .experiments.grid import Grid as Grid
from .experiments.grid import run_grid as run_grid
from .experiments.grid import sweep as sweep
from .experiments.info import describe as describe
from .experiments.run import export_run as export_run
from .experiments.run import load_run as load_run
from .experiments.run import train as train
from .hf.load import load_model as load_model
from .hf.peft import load_peft as load_peft
from .hf.peft import save_peft as save_peft
from .hf.save import save_hf as save_hf
from .inference.decode import generate_tokens as generate_tokens
from .inference.decode import stream_tokens as stream_tokens
from .inference.likelihood import option_log_likelihoods as option_log_likelihoods
from .inference.sampling import Sampler as Sampler
from .inference.serving import serve as serve
from .inference.text import generate as generate
from .inference.text import stream as stream
from .nn.kv_cache import KVCache as KVCache
from .nn.kv_cache import init_cache as init_cache
from .nn.llama import Llama as Llama
from .nn.llama import forward as forward
from .nn.llama import random_model as random_model
from .nn.vocabulary import resize_vocab as resize_vocab
from .training.trainer import NonFiniteError as NonFiniteError

__version__: str
