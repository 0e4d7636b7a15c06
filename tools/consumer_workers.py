"""Asks one consumer of exports in its own environment: a job (JSON) in, one line of JSON out.

Command: PYTHON tools/consumer_workers.py {vllm,transformers,llama.cpp} JOB, as
tools/check_consumers.py and tools/check_compressed.py run it. Needs nothing of this project.
"""

from __future__ import annotations

import gc
import json
import sys
from typing import Any

NEW_TOKENS = 48


def in_vllm(job: dict[str, Any]) -> dict[str, Any]:
    """vLLM's greedy "tokens" after each of job["ids"], in job["dtype"] or float32; of the ids but
    the first "logp", and "top", the likeliest token in their place.
    """
    from vllm import LLM, SamplingParams

    engine = LLM(
        job["export"],
        dtype=job.get("dtype", "float32"),
        hf_overrides=job.get("overrides", {}),
        enforce_eager=True,
        max_model_len=512,
        max_num_batched_tokens=512,
        skip_tokenizer_init=True,
        max_num_seqs=4,
    )
    sampling = SamplingParams(
        temperature=0.0, max_tokens=NEW_TOKENS, prompt_logprobs=1, ignore_eos=True, detokenize=False
    )
    out = engine.generate(
        [{"prompt_token_ids": ids} for ids in job["ids"]], sampling, use_tqdm=False
    )
    pairs = [list(zip(one.prompt_logprobs, one.prompt_token_ids, strict=True))[1:] for one in out]
    return {
        "tokens": [list(one.outputs[0].token_ids) for one in out],
        "logp": [[at[token].logprob for at, token in row] for row in pairs],
        "top": [[min(at, key=lambda t: at[t].rank) for at, _ in row] for row in pairs],
    }


def in_transformers(job: dict[str, Any]) -> dict[str, Any]:
    """As `in_vllm`."""
    import torch
    import transformers

    loader, dtype = transformers.AutoModelForCausalLM, job.get("dtype", "float32")
    model = loader.from_pretrained(job["export"], dtype=getattr(torch, dtype)).eval()
    model.generation_config.eos_token_id = None  # which min_new_tokens would forbid
    options = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "pad_token_id": 0}
    answer: dict[str, Any] = {"tokens": [], "logp": [], "top": []}
    for ids in map(torch.tensor, job["ids"]):
        answer["tokens"].append(model.generate(ids[None], **options)[0, len(ids) :].tolist())
        with torch.no_grad():
            logits = model(ids[None]).logits[0, :-1].float()
        answer["logp"].append(logits.log_softmax(-1).gather(-1, ids[1:, None])[:, 0].tolist())
        answer["top"].append(logits.argmax(-1).tolist())
    return answer


def in_llama_cpp(job: dict[str, Any]) -> dict[str, Any]:
    """{"tokens"}: llama.cpp's greedy tokens after each of job["ids"]; with job["chunks"] "nll" too,
    the mean negative log-likelihood of their tokens.
    """
    from llama_cpp_worker import greedy, score

    out: dict[str, Any] = {"tokens": greedy(job["gguf"], job["ids"], NEW_TOKENS)}
    return out | {"nll": score(job["gguf"], job["chunks"])} if "chunks" in job else out


WORKERS = {
    "vllm": in_vllm,
    "transformers": in_transformers,
    "llama.cpp": in_llama_cpp,
}


def main(worker: str, job: dict[str, Any]) -> Any:
    """The worker's answer; a list for a job with "each", the changes of each of several jobs."""
    if "each" not in job:
        return WORKERS[worker](job)
    answers: list[Any] = []
    for change in job.pop("each"):
        try:
            answers.append(WORKERS[worker](job | change))
        except Exception as error:
            answers.append({"error": f"{type(error).__name__}: {error}"[:200]})
        gc.collect()
    return answers


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], json.loads(sys.argv[2]))))
