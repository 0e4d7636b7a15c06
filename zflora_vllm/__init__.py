"""Tasks of one base in a running vLLM: their slices (`zf.save_slices`) are written into the kernels
of a fused export that is being served, between requests (docs/serve.md).

Nothing here imports zflora_jax or jax, and zflora_jax imports nothing of this.
"""
