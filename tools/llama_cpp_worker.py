"""Runs a GGUF file in llama.cpp, as the package xllamacpp brings it.

tools/consumer_workers.py calls it in an environment with xllamacpp and numpy. Linux on x86-64:
scores come from llama.cpp's C functions, whose large settings are passed by value as blocks of
bytes.
"""

from __future__ import annotations

import ctypes
import importlib.util
from typing import Any

THREADS = 1  # more of them wait for each other in loops, which is slow next to other work


def greedy(file: str, prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
    """The greedy tokens after each prompt, with keys and values in float32."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.n_parallel = file, 512, 1
    params.cpuparams.n_threads, params.warmup, params.fit_params = THREADS, False, False
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    server = xllamacpp.Server(params)
    settings = {"temperature": 0.0, "logprobs": 1, "cache_prompt": False}
    tokens = []
    for prompt in prompts:
        found: list[int] = []
        while len(found) < new_tokens:  # it stops behind an end token, and goes on if asked again
            asked = {"prompt": [*prompt, *found], "n_predict": new_tokens - len(found)}
            [choice] = server.handle_completions(asked | settings)["choices"]
            found += [token["id"] for token in choice["logprobs"]["content"]]
        tokens.append(found)
    return tokens


class _Settings(ctypes.Structure):
    """llama.cpp's settings of a model or a context: more bytes than either has. Their content is
    the library's own, but for the first three numbers of a context.
    """

    _fields_ = [("numbers", ctypes.c_uint32 * 512)]


class _Batch(ctypes.Structure):
    """llama.cpp's llama_batch."""

    _fields_ = [
        ("n_tokens", ctypes.c_int32),
        ("token", ctypes.POINTER(ctypes.c_int32)),
        ("embd", ctypes.c_void_p),
        ("pos", ctypes.POINTER(ctypes.c_int32)),
        ("n_seq_id", ctypes.POINTER(ctypes.c_int32)),
        ("seq_id", ctypes.POINTER(ctypes.POINTER(ctypes.c_int32))),
        ("logits", ctypes.POINTER(ctypes.c_int8)),
    ]


def _library() -> Any:
    """llama.cpp's C functions."""
    spec = importlib.util.find_spec("xllamacpp.xllamacpp")
    if spec is None or spec.origin is None:
        raise SystemExit("xllamacpp is not installed here: pip install xllamacpp")
    lib, pointer, i32 = ctypes.CDLL(spec.origin), ctypes.c_void_p, ctypes.c_int32
    signatures: dict[str, tuple[Any, list[Any]]] = {
        "llama_model_default_params": (_Settings, []),
        "llama_context_default_params": (_Settings, []),
        "llama_model_load_from_file": (pointer, [ctypes.c_char_p, _Settings]),
        "llama_init_from_model": (pointer, [pointer, _Settings]),
        "llama_batch_init": (_Batch, [i32] * 3),
        "llama_decode": (i32, [pointer, _Batch]),
        "llama_get_logits": (ctypes.POINTER(ctypes.c_float), [pointer]),
        "llama_get_memory": (pointer, [pointer]),
        "llama_memory_clear": (None, [pointer, ctypes.c_bool]),
        "llama_set_n_threads": (None, [pointer, i32, i32]),
        "llama_model_get_vocab": (pointer, [pointer]),
        "llama_vocab_n_tokens": (i32, [pointer]),
    }
    for name, (result, arguments) in signatures.items():
        function = getattr(lib, name)
        function.restype, function.argtypes = result, arguments
    return lib


def score(file: str, chunks: list[list[int]]) -> float:
    """The mean negative log-likelihood of the tokens of each chunk but its first, in nats. Keys and
    values are float16, llama.cpp's default.
    """
    import numpy as np

    lib, longest = _library(), max(map(len, chunks))
    lib.llama_backend_init()
    model = lib.llama_model_load_from_file(file.encode(), lib.llama_model_default_params())
    if not model:
        raise SystemExit(f"error: llama.cpp cannot load {file}")
    settings = lib.llama_context_default_params()
    for i in range(3):  # n_ctx, n_batch, n_ubatch
        settings.numbers[i] = longest
    context = lib.llama_init_from_model(model, settings)
    lib.llama_set_n_threads(context, THREADS, THREADS)
    vocab = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(model))
    batch, losses = lib.llama_batch_init(longest, 0, 1), []
    for chunk in chunks:
        lib.llama_memory_clear(lib.llama_get_memory(context), True)
        batch.n_tokens = len(chunk)
        for i, token in enumerate(chunk):
            batch.token[i], batch.pos[i], batch.n_seq_id[i] = token, i, 1
            batch.seq_id[i][0], batch.logits[i] = 0, True
        if lib.llama_decode(context, batch):
            raise SystemExit(f"error: llama.cpp cannot decode {len(chunk)} tokens")
        logits = np.ctypeslib.as_array(lib.llama_get_logits(context), (len(chunk), vocab))
        rows = logits[:-1].astype(np.float64)
        rows -= rows.max(-1, keepdims=True)
        losses.append(np.log(np.exp(rows).sum(-1)) - rows[np.arange(len(rows)), chunk[1:]])
    return float(np.mean(np.concatenate(losses)))
