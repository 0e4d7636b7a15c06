"""Names of PEFT, TRL, transformers and Cloud TPU, and this project's names for the same things.
Error messages (`fields.nearest`) and the table in docs/settings.md use them.
"""

from __future__ import annotations

_ROWS = """
r, lora_r: `adapter.rank` | lora_alpha: `adapter.alpha` | lora_dropout: `adapter.dropout`
target_modules: `adapter.targets`, a regex of kernel names: `q|v` for `q_proj`, `v_proj`
all-linear: `adapter.targets=all` | init_lora_weights: `adapter.init`
dora: `adapter.method=lora adapter.use_dora=True` | pissa: `adapter.method=lora adapter.init=pissa`
rslora: `adapter.method=lora adapter.use_rslora=True adapter.alpha=16`
qlora: `adapter.method=lora quantize.kernels=nf4`
load_in_4bit: `quantize.kernels=nf4` | load_in_8bit: `quantize.kernels=int8`
modules_to_save, bias: nothing: all but the adapter is frozen, or trained by `adapter.method=full`
model_name_or_path: `model` | dataset_name: `data.task=rows data.data_dir=hub:OWNER/NAME`
dataset_text_field: `data.row_format=text`
max_length, max_seq_length, cutoff_len: `data.bucket_lengths`; the longest is the limit
assistant_only_loss, completion_only_loss, train_on_inputs: `data.train_on_prompt`, off by default
per_device_train_batch_size: `data.batch_size`, the rows of a step on all devices together
gradient_accumulation_steps: `data.grad_accum_steps`, the parts of `data.batch_size`
lr: `optim.learning_rate` | lr_scheduler_type: `optim.schedule`
warmup_ratio: `optim.warmup_steps`, a number of steps | max_grad_norm: `optim.clip_norm`
adam_beta1: `optim.b1` | adam_beta2: `optim.b2` | adam_epsilon: `optim.eps`
adamw_torch, adamw_torch_fused: `optim.optimizer=adamw` | loraplus_lr_ratio: `optim.loraplus_ratio`
num_train_epochs, num_epochs: `train.epochs` | max_steps: `train.steps`
bf16: `train.dtype=bfloat16` | logging_steps: `train.log_every` | eval_steps: `train.eval_every`
gradient_checkpointing: `train.remat`: `block` for the least memory, `none` without
save_steps: `train.save_every` | save_total_limit: `train.max_to_keep`
load_best_model_at_end: `train.keep_best` | output_dir: `--workdir`
resume_from_checkpoint: the same command again, or `--resume`
get_peft_model: `zf.init_adapters` | SFTTrainer: `zf.train`
DPOTrainer: `train.loss=dpo`, its beta `train.dpo_beta`
merge_and_unload: `zf.fuse` | PeftModel.from_pretrained: `zf.load_peft`
save_pretrained: `zf.save_peft`, `zf.save_hf`, `zf.export_run`
v5e-4, v5litepod-4: `tpu:v5e:2x2` | v5e-8, v5litepod-8: `tpu:v5e:2x4`
v5e-16, v5litepod-16: `tpu:v5e:4x4` | v6e-8: `tpu:v6e:2x4`
v5p-8: `tpu:v5p:2x2x1`, four chips of two cores
"""
FOREIGN = dict(row.split(": ", 1) for row in _ROWS.strip().replace(" | ", "\n").splitlines())
"""Names in other libraries, joined by ", " -> this project's names."""
