"""Hugging Face directories, GGUF files and PEFT adapters: read into native trees, written from
them.

There is no data and no training here, and torch is never imported.
"""
