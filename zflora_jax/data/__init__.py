"""Tasks, prompts and batches: TFDS builders read as random-access sources, tokenised once, batched
by grain.

No model: a batch is token ids, targets and masks.
"""
