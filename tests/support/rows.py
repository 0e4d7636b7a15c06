"""Files of rows written for a test, and the examples that a task makes of them."""

import json

from zflora_jax.core.run_config import DataConfig
from zflora_jax.data.tasks import load_examples


def write(path, *rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def load(task, split, directory=None):
    return list(load_examples(task, split, DataConfig(data_dir=directory and str(directory))))
