"""GGUF files, which llama.cpp runs: read into native trees, written from them."""
