"""The model: layers, `Llama`, its KV cache; one forward for base, adapted, fused and packed
trees. Also functions of whole models: quantisation, another vocabulary size.

No tricks for compilers (ops) and no token loop (inference).
"""
