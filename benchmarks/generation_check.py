"""Generated answers against transformers' `generate` on real questions: the same token ids, greedy
and by beam search?

Command: python benchmarks/generation_check.py --data-dir DIR
(about 6 minutes on 2 CPU cores; needs the test extra)
Writes results/generation_check.json and .md. The packaged SmolLM2-135M in float32; the first rows
of ARC-Easy and GSM8K (LLM-Adapters' and OpenAI's test files below DIR), prompts and stop tokens as
`zflora eval` makes them. transformers decodes each prompt alone, without padding.
"""

from __future__ import annotations

import argparse
import tempfile
from typing import Any

import torch
import transformers

from zflora_jax.core.run_config import DataConfig
from zflora_jax.data.encoding import encode_prompts
from zflora_jax.data.tasks import load_examples
from zflora_jax.hf.load import load_model
from zflora_jax.hf.save import save_hf
from zflora_jax.inference.decode import generate_tokens
from zflora_jax.inference.text import stop_ids
from zflora_jax.reporting.files import write_result
from zflora_jax.reporting.provenance import environment, origin_line
from zflora_jax.reporting.tables import markdown_table

TASKS = {"arc_easy": 32, "gsm8k": 96}  # new tokens
BEAMS = (1, 4)


@torch.no_grad()  # type: ignore[untyped-decorator]
def theirs(model: Any, prompt: list[int], stop: list[int], beams: int, new: int) -> list[int]:
    ids = torch.tensor([prompt])
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        num_beams=beams,
        max_new_tokens=new,
        eos_token_id=stop,
        pad_token_id=0,
    )
    return [int(i) for i in out[0, len(prompt) :]]


def page(result: dict[str, Any]) -> str:
    shown = [{k: v for k, v in row.items() if k != "different"} for row in result["rows"]]
    return f"""# Generated token ids against transformers {result["transformers"]}

Does this project generate the same token ids as transformers' `generate` on real questions, greedy
and by beam search?

{markdown_table(shown, list(shown[0]))}

{origin_line(result["environment"])}
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data-dir", required=True, metavar="DIR")
    parser.add_argument("--rows", type=int, default=20, help="of each task (default: 20)")
    args = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    model, rows = load_model("smollm2-135m", dtype="float32"), []
    with tempfile.TemporaryDirectory() as folder:
        save_hf(f"{folder}/model", model)
        stock = transformers.AutoModelForCausalLM.from_pretrained(
            f"{folder}/model", dtype=torch.float32
        ).eval()
        for task, new in TASKS.items():
            examples = load_examples(task, "test", DataConfig(task=task, data_dir=args.data_dir))[
                : args.rows
            ]
            prompts, stop = (
                encode_prompts(examples, model.tokenizer, "chat"),
                stop_ids(model, "chat"),
            )
            for beams in BEAMS:
                ours = generate_tokens(
                    model,
                    prompts,
                    max_new_tokens=new,
                    stop_token_ids=stop,
                    num_beams=beams,
                    batch_size=8,
                )
                want = [theirs(stock, prompt, stop, beams, new) for prompt in prompts]
                same = [a == b for a, b in zip(ours, want, strict=True)]
                differ = [
                    {"row": i, "ours": ours[i], "transformers": want[i]}
                    for i, equal in enumerate(same)
                    if not equal
                ]
                row = {
                    "task": task,
                    "beams": beams,
                    "new tokens, at most": new,
                    "rows": len(same),
                    "equal": sum(same),
                }
                rows.append(row | {"tokens compared": sum(map(len, want)), "different": differ})
                print(row, flush=True)
    result = {
        "rows": rows,
        "transformers": transformers.__version__,
        "environment": environment(),
    }
    write_result("results/generation_check", result, page(result))


if __name__ == "__main__":
    main()
