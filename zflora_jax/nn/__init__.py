"""The model: layers, `Llama`, its KV cache; one forward for base, adapted, fused and packed
trees.

No tricks for compilers (ops) and no token loop (inference).
"""
