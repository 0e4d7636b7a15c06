"""Task files written for a test, and the prompts read from them."""

import json

from zflora_jax.core.run_config import DataConfig
from zflora_jax.data.tasks import (
    load_examples,
)


def write(path, questions, **fields):
    rows = [
        {"instruction": q, "input": "", "output": f"A: The answer is {i}.", "answer": str(i)}
        | fields
        for i, q in enumerate(questions)
    ]
    path.write_text(
        json.dumps(rows) if path.suffix == ".json" else "\n".join(map(json.dumps, rows))
    )


def prompts_of(split, directory, task="json", **fields):
    return [
        example.prompt
        for example in load_examples(task, split, DataConfig(data_dir=str(directory), **fields))
    ]
