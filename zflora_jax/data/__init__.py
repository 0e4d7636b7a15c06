"""Tasks, prompts and batches: TFDS builders read as random-access sources, tokenised once, batched
by grain.

There is no model here: a batch is token ids, targets and masks.
"""
