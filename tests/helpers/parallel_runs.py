"""Five training steps of tiny models, in one process or as one of several, and the comparison of such runs."""

import json
import os
import tempfile
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
import transformers
from safetensors.torch import load_file
from tiny_training import ArrayStream, noiseless_lm, tiny_arguments
from torch.distributed.tensor import DTensor
from torch.nn.utils.rnn import pad_sequence
from transformers import TrainerCallback

from moe_hf import GnmtMoeConfig, GnmtMoeForConditionalGeneration
from moe_hf.data.windows import StreamWindows, collate_windows
from moe_hf.distributed.sharding import distributed_config, shard_new_model
from moe_hf.models.factored_gradients import row_gradients
from moe_hf.models.moe import MoeBlock
from moe_hf.training.arguments import TranslationTrainingArguments
from moe_hf.training.lm_trainer import LmTrainer
from moe_hf.training.translation_trainer import TranslationTrainer

ROWS, STEPS = 8, 5  # sequences of a step's batch over all processes, and number of steps
GATES = {
    "noisy": {"gating": "noisy_top_k"},
    "softmax": {"gating": "softmax_top_k"},
    "hierarchical": {"gating": "noisy_top_k", "num_expert_groups": 4, "num_experts_per_tok": 4},
    "balanced": {"gating": "strictly_balanced"},
}
COEFS = {"importance_loss_coef": 0.3, "load_loss_coef": 0.2, "threshold_loss_coef": 0.3}
# Adam divides by the gradient's size: with the usual epsilon, a gradient of rounding errors makes a full step.
ARGUMENTS = dict(optim="adamw_torch", adam_epsilon=1e-3, learning_rate=0.02, max_grad_norm=0.2, max_steps=STEPS)


def make_model(family: str, **config):
    """A new model with 8 experts, in float32; its weights are so large that every weight matters."""
    config = COEFS | {"num_experts": 8, "num_experts_per_tok": 2} | config
    if family == "lm":
        model = noiseless_lm(torch.float32, **config)
    else:
        sizes = dict(vocab_size=23, hidden_size=8, moe_intermediate_size=8, dropout=0.0)
        tokens = dict(pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1)
        torch.manual_seed(0)
        model = GnmtMoeForConditionalGeneration(GnmtMoeConfig(**(sizes | tokens | config)))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "threshold" not in name:
                weight.copy_(0.5 * torch.randn(weight.shape, generator=generator))
    return model


def rows_of(family: str, num_rows: int, empty_from: int | None = None) -> list[dict[str, torch.Tensor]]:
    """Sequences of 1 to 7 tokens; in each step's 8 rows, the rows from `empty_from` on are empty."""
    lengths = [1 + (i * i + i // 8) % 7 for i in range(num_rows)]
    if empty_from is not None:
        lengths = [length if i % ROWS < empty_from else 0 for i, length in enumerate(lengths)]
    if family == "lm":
        stream = ArrayStream(num_rows * 7 + 1)
        # Each row of a batch starts differently: equal rows tie in a strictly balanced gate, and rounding breaks the
        # tie. Rounding depends on the shape of a process's batch.
        stream.tokens[:-1:7] = torch.arange(num_rows) % ROWS
        windows = StreamWindows(stream, 7)
        return [{k: v[:length] for k, v in window.items()} for window, length in zip(windows, lengths)]
    generator = torch.Generator().manual_seed(2)
    draw = [torch.randint(3, 23, (2, 7), generator=generator) for _ in range(num_rows)]
    return [
        {"input_ids": ids[:length], "labels": labels[: 8 - length]}
        for (ids, labels), length in zip(draw, lengths, strict=True)
    ]


def collate_pairs(rows):
    ids = pad_sequence([row["input_ids"] for row in rows], batch_first=True)
    mask = pad_sequence([torch.ones_like(row["input_ids"]) for row in rows], batch_first=True)
    labels = pad_sequence([row["labels"] for row in rows], batch_first=True, padding_value=-100)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


class Recorder(TrainerCallback):
    """Records this process's logits and losses of every step, and the first step's clipped, unsharded gradients."""

    def __init__(self, model):
        self.outputs, self.gradients = [], None
        model.register_forward_hook(self.observe, with_kwargs=True)

    def observe(self, model, args, kwargs, outputs):
        labels = kwargs.get("shift_labels", kwargs["labels"])
        logits = outputs.logits.detach().float()[labels != -100]
        self.outputs.append((logits, outputs.loss.item(), outputs.aux_loss.item()))

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if self.gradients is None:
            self.gradients = {name: gradient_of(weight).clone() for name, weight in model.named_parameters()}


def gradient_of(weight: torch.nn.Parameter) -> torch.Tensor:
    if weight.grad is None:
        (rows,) = row_gradients(weight)
        own = rows.dense()
        sharding = (weight.device_mesh, weight.placements) if hasattr(weight, "placements") else None
        return whole(DTensor.from_local(own, *sharding)) if sharding else own
    return whole(weight.grad)


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


@contextmanager
def noise_of_the_token():
    """Noise that is a function of the token's logits, so that every process draws the same noise."""
    drawn = torch.randn_like
    torch.randn_like = lambda logits: torch.sin(3 * logits.detach())
    try:
        yield
    finally:
        torch.randn_like = drawn


def to_the_first_experts(gate, inputs, routed):
    """A hook for gates that sends every token to the experts 0 to K - 1."""
    top_k_index = routed.top_k_index
    return routed._replace(top_k_index=torch.arange(top_k_index.shape[1]).expand_as(top_k_index))


def train(family, gate="softmax", layout=None, empty_from=None, crowd=False, changes=None, **arguments) -> dict:
    """Runs five steps on the same 40 rows; one process of several uses its part of each step's rows.

    Args:
        layout: expert_parallel_size, or "fsdp" for accelerate's FSDP2.
        empty_from: first empty row of each step, as in `rows_of`.
        crowd: whether every token goes to the first experts.
        changes: further arguments of the model's configuration.
    """
    transformers.utils.logging.disable_progress_bar()
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    accumulation = arguments.get("gradient_accumulation_steps", 1)
    folder = Path(os.environ.get("SHARED_FOLDER") or tempfile.mkdtemp())
    rows = rows_of(family, ROWS * STEPS * accumulation, empty_from)
    arguments = ARGUMENTS | {"per_device_train_batch_size": ROWS // world_size} | arguments
    if isinstance(layout, int):
        arguments["expert_parallel_size"] = layout
    if family == "lm":
        args, trainer_class, collate = tiny_arguments(folder, **arguments), LmTrainer, collate_windows
    else:
        own = {name: value for name, value in vars(tiny_arguments(folder)).items() if name in TINY}
        args = TranslationTrainingArguments(**(own | {"output_dir": str(folder)} | arguments))
        trainer_class, collate = TranslationTrainer, collate_pairs
        args.remove_unused_columns = False
    model = make_model(family, **GATES[gate], **(changes or {}))
    if layout == "fsdp":
        accelerate_fsdp_on_cpu(args)
    elif sharding := distributed_config(args):
        model = shard_new_model(lambda whole=model: whole, sharding)
    if args.expert_gradients == "factored":
        model.set_experts_implementation("moe_hf")
    recorder = Recorder(model)
    trainer = trainer_class(model=model, args=args, train_dataset=rows, data_collator=collate, callbacks=[recorder])
    if crowd:
        for module in model.modules():
            if isinstance(module, MoeBlock):
                module.gate.register_forward_hook(to_the_first_experts)
    with noise_of_the_token():
        trainer.train()
    trainer.save_model(str(folder / "trained"))
    weights = saved = None
    if not dist.is_initialized() or dist.get_rank() == 0:
        weights = load_file(folder / "trained" / "model.safetensors")
        saved = json.loads((folder / "trained" / "config.json").read_text()), os.listdir(folder / "trained")
    logs = [log for log in trainer.state.log_history if "loss" in log]
    return {
        "outputs": recorder.outputs,
        "gradients": recorder.gradients,
        "loss": [log["loss"] for log in logs],
        "grad_norm": [float(log["grad_norm"]) for log in logs],
        "weights": weights,
        "saved": saved,
        "class": type(trainer.model_wrapped).__name__,
        "sharded": any(hasattr(weight, "full_tensor") for weight in trainer.model.parameters()),
    }


TINY = ("use_cpu", "report_to", "disable_tqdm", "save_strategy", "lr_scheduler_type", "logging_steps")
TINY += ("train_sampling_strategy",)


def accelerate_fsdp_on_cpu(args):
    """Makes accelerate use FSDP on a CPU: its state.py otherwise ignores FSDP there without a warning."""
    from accelerate import PartialState
    from accelerate.utils import DistributedType

    assert args.world_size > 1
    os.environ |= {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
    os.environ |= {"FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP", "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT"}
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU


def assert_same_training(parts: list[dict], expected: dict, rtol=1e-5, atol=1e-5) -> None:
    """Compares the `parts` of the processes of one run with the `expected` results of a single process."""
    close = dict(rtol=rtol, atol=atol)
    num_micro = len(expected["outputs"]) // STEPS
    for step, (logits, loss, aux_loss) in enumerate(expected["outputs"]):
        own = [part["outputs"][step] for part in parts]
        torch.testing.assert_close(torch.cat([logits for logits, _, _ in own]), logits, **close)
        for _, _, own_aux_loss in own:
            torch.testing.assert_close(own_aux_loss, aux_loss, **close)
        torch.testing.assert_close(sum(own_loss for _, own_loss, _ in own), loss, **close)
    assert num_micro * STEPS == len(parts[0]["outputs"])
    for part in parts:
        for name, gradient in expected["gradients"].items():
            torch.testing.assert_close(part["gradients"][name], gradient, **close, msg=lambda m: f"{name}: {m}")
        torch.testing.assert_close(part["grad_norm"], expected["grad_norm"], **close)
    torch.testing.assert_close(parts[0]["loss"], expected["loss"], **close)
    (config, files), (expected_config, expected_files) = parts[0]["saved"], expected["saved"]
    assert config == expected_config and "auto_map" in config
    assert set(expected_files) <= set(files)  # runs that share a start of the processes share a folder
    assert parts[0]["weights"].keys() == expected["weights"].keys()
    for name, weight in expected["weights"].items():
        torch.testing.assert_close(parts[0]["weights"][name], weight, **close, msg=lambda m: f"{name}: {m}")
