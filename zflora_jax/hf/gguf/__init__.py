"""GGUF files, which llama.cpp runs: read into native trees, written from them.

`file` is the container, `names` the names and row order of tensors, `types` their types and bytes.
`read` loads a model; `write` writes one in its `form`, `keep` with the base's own blocks; both use
`tokenizer`.
"""
