"""Task files written for a test, and the examples and prompts read from them."""

import json

from zflora_jax.core.run_config import DataConfig
from zflora_jax.data.tasks import load_examples


def write(path, *rows):
    """One row a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def write_questions(path, questions, **fields):
    """Rows in LLM-Adapters' form, one a line or, in a .json file, as one list; fields: of every
    row.
    """
    rows = [
        {"instruction": q, "input": "", "output": f"A: The answer is {i}.", "answer": str(i)}
        | fields
        for i, q in enumerate(questions)
    ]
    write(path, *([rows] if path.suffix == ".json" else rows))


def load(task, split, directory=None, **fields):
    data = DataConfig(data_dir=directory and str(directory), **fields)
    return list(load_examples(task, split, data))


def prompts_of(split, directory, task="rows", **fields):
    return [example.prompt for example in load(task, split, directory, **fields)]
