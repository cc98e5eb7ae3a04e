#!/usr/bin/env python3
"""Bytes that a training step moves with the experts spread over 1, 2 and 4 processes, measured and predicted.

    python benchmarks/sharding.py [--output benchmarks/results/sharding.md]

Scaling is weak: each process has the same number of tokens. Every collective is counted where torch dispatches it, on
each rank, and the mean over the ranks is shown. Processes of one machine cannot show a speed-up, so the report shows
only the composition of a step's processor time. Communication is the time in collectives, in FSDP's copies for
collectives and in the threads that run collectives; waiting does not count. The predictions come from
moe_hf.distributed.plan.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path

import torch
import torch.distributed as dist
import transformers
from report import heading, save
from transformers.distributed import DistributedConfig

from moe_hf import GnmtMoeConfig, GnmtMoeForConditionalGeneration, LstmMoeConfig, LstmMoeForCausalLM
from moe_hf.distributed.communication import CollectiveCounter
from moe_hf.distributed.plan import Cluster, plan_sharding
from moe_hf.training.optimizer import FactoredAdam, expert_parameters

MODELS = {
    "LM": {},
    "LM, hierarchical gate": {"num_expert_groups": 4},
    "LM, strictly balanced": {"gating": "strictly_balanced"},
    "LM, experts recomputed": {"recompute_experts": True},
    "LM, a quarter is padding": {},
    "translation": {"decoder_start_token_id": 1},
}
SIZES = ("hidden_size", "moe_intermediate_size", "num_experts", "vocab_size")
GENERATION = "generation"
LENGTH = 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden_size", type=int, default=128)
    parser.add_argument("--moe_intermediate_size", type=int, default=512)
    parser.add_argument("--num_experts", type=int, default=32)
    parser.add_argument("--vocab_size", type=int, default=2000)
    parser.add_argument("--tokens", type=int, default=1024, help=f"tokens of each process, in rows of {LENGTH}")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--steps", type=int, default=3, help="timed steps, after one warm-up step")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--output", type=Path, help="Markdown file to write the tables to")
    parser.add_argument("--worker", help=argparse.SUPPRESS)  # the folder with the models, in a process of torchrun
    arguments = parser.parse_args()
    if arguments.worker:
        work(arguments)
        return
    facts = (
        f"gloo, d = {arguments.hidden_size}, h = {arguments.moe_intermediate_size}, n = {arguments.num_experts}, "
        f"k = 4, V = {arguments.vocab_size}, {arguments.tokens} tokens for each process"
    )
    lines = heading("Sharded training steps: bytes moved and composition", facts)
    with tempfile.TemporaryDirectory() as folder:
        for name in arguments.models:
            build(name, arguments).save_pretrained(Path(folder) / name)
        results = {processes: launch(processes, folder, arguments) for processes in arguments.processes}
    lines += generation_table({processes: result.pop(GENERATION, None) for processes, result in results.items()})
    lines += bytes_table(results) + memory_table(results) + composition_table(results)
    print("\n".join(lines))
    save(lines, arguments.output)


def build(name: str, arguments) -> torch.nn.Module:
    torch.manual_seed(0)
    config_class, model_class = classes(name)
    sizes = {size: getattr(arguments, size) for size in SIZES}
    model = model_class(config_class(**sizes, pad_token_id=0, **MODELS[name]))
    for parameter_name, weight in model.named_parameters():
        if "gate" in parameter_name:
            torch.nn.init.normal_(weight, std=0.1)  # gates start at zero, where noise alone chooses
    return model


def classes(name: str) -> tuple[type, type]:
    if name == "translation":
        return GnmtMoeConfig, GnmtMoeForConditionalGeneration
    return LstmMoeConfig, LstmMoeForCausalLM


def launch(processes: int, folder: str, arguments) -> dict:
    """Returns the results of `work` on `processes` processes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command += [__file__, f"--worker={folder}"]
    command += [f"--{name}={getattr(arguments, name)}" for name in (*SIZES, "tokens", "steps")]
    command += ["--models", *arguments.models]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment, timeout=300)
    return json.loads(run.stdout.splitlines()[-1])


def work(arguments) -> None:
    """Runs in each process; rank 0 prints each model's measurements as means over the ranks."""
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    results = {}
    for name in arguments.models:
        ranks = [None] * dist.get_world_size()
        dist.all_gather_object(ranks, measure(name, arguments))
        results[name] = {key: sum(rank[key] for rank in ranks) / len(ranks) for key in ranks[0]}
    if dist.get_world_size() > 1 and "LM" in arguments.models:
        results[GENERATION] = measure_generation(arguments)
    if dist.get_rank() == 0:
        print(json.dumps(results))
    dist.destroy_process_group()


def measure(name: str, arguments) -> dict[str, float]:
    """Returns this rank's bytes per token, planned and sent, and the processor seconds of a step."""
    processes, rank = dist.get_world_size(), dist.get_rank()
    options = (
        {"distributed_config": DistributedConfig(fsdp_size=processes, ep_size=processes)} if processes > 1 else {}
    )
    model = classes(name)[1].from_pretrained(Path(arguments.worker) / name, **options).train()
    plan = plan_sharding(model.config, Cluster(processes, flops=1, bandwidth=1), arguments.tokens)
    experts = expert_parameters(model)
    others = [param for param in model.parameters() if all(param is not expert for expert in experts)]
    optimizer = FactoredAdam([{"params": experts, "factored": True}, {"params": others}], lr=1e-3)
    torch.manual_seed(rank)
    shape = (arguments.tokens // LENGTH, LENGTH)
    ids, mask = torch.randint(3, arguments.vocab_size, shape), torch.ones(shape, dtype=torch.long)
    if "padding" in name:
        mask[:, -LENGTH // 4 :] = 0
    elsewhere = CountElsewhere(model, processes, rank)

    seconds = dict.fromkeys(("compute", "communication", "optimizer"), 0.0)
    for step in range(1 + arguments.steps):
        counter = TimedCounter()
        start, start_all = time.thread_time(), time.process_time()
        with counter, elsewhere:
            model(input_ids=ids, attention_mask=mask, labels=ids).loss.backward()
        middle = time.thread_time()
        optimizer.step()
        optimizer.zero_grad()
        end = time.thread_time()
        if step:
            other_threads = time.process_time() - start_all - (end - start)
            seconds["compute"] += (middle - start - counter.seconds) / arguments.steps
            seconds["communication"] += (counter.seconds + other_threads) / arguments.steps
            seconds["optimizer"] += (end - middle) / arguments.steps
    sent = {name: counter.sent[name] / arguments.tokens for name in COLLECTIVES}
    passes, kept = peak_bytes(lambda: model(input_ids=ids, attention_mask=mask, labels=ids).loss.backward())
    update, _ = peak_bytes(optimizer.step)
    gradients = sum(part.gradients for part in (plan.experts, plan.dense, plan.embeddings))
    return {
        **sent,
        "gradients": kept,
        "planned gradients": gradients,
        "peak of the passes": passes,
        "planned peak": gradients + plan.gathered + plan.activations,
        "peak of the update": update,
        **seconds,
        "elsewhere": elsewhere.share,
        "planned all_to_all": plan.all_to_all / arguments.tokens,
        "planned dense": plan.dense_exchange / arguments.tokens,
    }


def peak_bytes(run: Callable[[], None]) -> tuple[int, int]:
    """Returns the peak bytes of tensors created during a call, and their bytes left after the call."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    sizes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return max(accumulate(sizes, initial=0)), sum(sizes)


def memory_table(results: dict) -> list[str]:
    names = ("gradients", "planned gradients", "peak of the passes", "planned peak", "peak of the update")
    lines = [
        "Memory that a step adds on each process, MB: the gradients that stay, the most that forward and backward "
        "pass have at once, and what FactoredAdam has for a moment. The plan counts what is kept, not what an "
        "operation has for a moment, such as the softmax's gradient or the rows of the experts' backward pass.",
        "",
        "| model | processes | " + " | ".join(names) + " |",
        "|---" * (2 + len(names)) + "|",
    ]
    for name in next(iter(results.values())):
        for processes, result in results.items():
            texts = [f"{result[name][key] / 1e6:.1f}" for key in names]
            lines.append(f"| {name} | {processes} | " + " | ".join(texts) + " |")
    return [*lines, ""]


def measure_generation(arguments) -> dict[str, float]:
    """Returns the bytes per token that a MoE layer sends in generation, with the same tokens on all ranks."""
    processes = dist.get_world_size()
    layout = DistributedConfig(tp_size=processes, ep_size=processes)
    model = LstmMoeForCausalLM.from_pretrained(Path(arguments.worker) / "LM", distributed_config=layout).eval()
    hidden_states = torch.ones(arguments.tokens, arguments.hidden_size)
    routed = torch.zeros(arguments.tokens, 4, dtype=torch.long), torch.ones(arguments.tokens, 4)
    (experts,) = [module.experts for module in model.modules() if hasattr(module, "mix_experts")]
    with torch.no_grad(), CollectiveCounter() as counter:
        experts(hidden_states, *routed)
    return {name: sent / arguments.tokens for name, sent in counter.sent.items()}


COLLECTIVES = ("all_to_all", "all_to_all of counts", "all_gather", "reduce_scatter")


class TimedCounter(CollectiveCounter):
    """Also measures this thread's processor time in collectives and in FSDP's copies for collectives."""

    seconds = 0.0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        start = time.thread_time()
        result = super().__torch_dispatch__(func, types, args, kwargs)
        if func.namespace in ("c10d", "_c10d_functional", "fsdp"):
            self.seconds += time.thread_time() - start
        return result


class CountElsewhere:
    """A context that measures the share of (token, expert) pairs whose expert belongs to another rank."""

    def __init__(self, model, processes: int, rank: int):
        self.gates = [module.gate for module in model.modules() if hasattr(module, "mix_experts")]
        self.processes, self.rank, self.shares = processes, rank, []

    def count(self, gate, inputs, routed) -> None:
        index = routed.top_k_index
        if routed.threshold_loss is not None:
            index = index[routed.top_k_weights > 0]  # a strictly balanced gate sends only its used slots
        owner = index // (gate.num_experts // self.processes)
        self.shares.append((owner != self.rank).double().mean().item())

    @property
    def share(self) -> float:
        """The mean share over layers and calls."""
        return sum(self.shares) / len(self.shares)

    def __enter__(self):
        self.shares.clear()
        self.hooks = [gate.register_forward_hook(self.count) for gate in self.gates]

    def __exit__(self, *_):
        for hook in self.hooks:
            hook.remove()


def generation_table(results: dict) -> list[str]:
    lines = [
        "Generation, DistributedConfig(tp_size=P, ep_size=P), every rank with the same tokens: what a rank sends for "
        "each token and MoE layer. Each computes its own experts for all tokens, and one all-reduce sums d values a "
        "token, of which a rank sends 2 (P - 1) / P at least.",
        "",
        "| processes | bytes |",
        "|---|---|",
    ]
    for processes, sent in results.items():
        if sent:
            texts = ", ".join(f"{name}: {size:,.1f}" for name, size in sent.items())
            lines.append(f"| {processes} | {texts} |")
    return [*lines, ""]


def bytes_table(results: dict) -> list[str]:
    lines = [
        "Bytes that a rank sends for each of its tokens in a step. Expected of the all-to-all: 4 k d values for each "
        "MoE layer (6 k d with recomputed experts), of which (P - 1) / P leave. Elsewhere: the share of the (token, "
        "expert) pairs whose expert was really on another rank.",
        "",
        "| model | processes | all-to-all | expected | elsewhere | counts | gathered and reduced | expected |",
        "|---" * 8 + "|",
    ]
    for name in next(iter(results.values())):
        for processes, result in results.items():
            numbers = result[name]
            dense = numbers["all_gather"] + numbers["reduce_scatter"]
            cells = [numbers["all_to_all"], numbers["planned all_to_all"], 100 * numbers["elsewhere"]]
            cells += [numbers["all_to_all of counts"], dense, numbers["planned dense"]]
            texts = [f"{cell:,.1f}" for cell in cells]
            texts[2] += " %"
            lines.append(f"| {name} | {processes} | " + " | ".join(texts) + " |")
    return [*lines, ""]


def composition_table(results: dict) -> list[str]:
    parts = ("compute", "communication", "optimizer")
    lines = ["Processor time of a step on each process, and its composition:", ""]
    lines += ["| model | processes | ms | " + " | ".join(parts) + " |", "|---" * 6 + "|"]
    for name in next(iter(results.values())):
        for processes, result in results.items():
            total = sum(result[name][part] for part in parts)
            shares = " | ".join(f"{100 * result[name][part] / total:.1f} %" for part in parts)
            lines.append(f"| {name} | {processes} | {1e3 * total:.0f} | {shares} |")
    return lines


if __name__ == "__main__":
    main()
