"""The model: layers, `Llama`, its KV cache; one forward for base, adapted, fused and packed
trees. Also functions of whole models: quantisation, another vocabulary size.

Tricks for compilers are in ops, and the token loop is in inference.
"""
