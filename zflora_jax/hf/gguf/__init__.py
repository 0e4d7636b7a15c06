"""GGUF files, which llama.cpp runs: read into native trees, written from them.

`file` is the container with its tensors' names, types and bytes; `read` loads a model, `write`
writes one; both use `tokenizer`.
"""
