"""The arguments of a training run of four steps."""

CONFIG = """
tokenizer_kind: word
vocab_size: 50
hidden_size: 8
num_experts: 4
num_experts_per_tok: 2
moe_intermediate_size: 8
window_length: 7
per_device_train_batch_size: 4
per_device_eval_batch_size: 4
max_steps: 4
logging_steps: 2
save_strategy: "no"
report_to: none
use_cpu: true
disable_tqdm: true
"""
