"""Hugging Face directories, GGUF files and PEFT adapters: read into native trees, written from
them.

No data and no training; torch is never imported.
"""
