"""Formats a plan for `moe-hf plan`."""

from .plan import (
    ShardingPlan,
    compute_to_transfer,
    needed_compute_to_transfer,
    num_moe_layers,
)

GB = 1e9
FEW_TOKENS = 64  # below it, fetching an expert's weights takes longer than using them (benchmarks/results/experts.md)


def describe(plan: ShardingPlan) -> str:
    """Return a plan as text."""
    config, cluster = plan.config, plan.cluster
    step = plan.compute_seconds + plan.all_to_all_seconds + plan.dense_seconds
    head = "{:<28}{:>13}{:>13}{:>13}{:>13}"
    lines = [
        f"{cluster.devices} devices, {plan.tokens:,} tokens each; n = {config.num_experts:,}, k = "
        f"{config.num_experts_per_tok}, d = {config.hidden_size}, h = {config.moe_intermediate_size}, MoE layers: "
        f"{num_moe_layers(config)}",
        f"experts per device: {plan.experts_per_device:,}; tokens per expert: {plan.tokens_per_expert:,.1f}; "
        f"optimizer: {plan.optimizer}; gradients of experts: {plan.expert_gradients}",
        "",
        head.format("GB per device", "parameters", "gradients", "optimizer", "all").rstrip(),
    ]
    for name, size in (
        ("experts", plan.experts),
        ("other layers, cut", plan.dense),
        ("embedding and softmax, cut", plan.embeddings),
    ):
        lines.append(head.format(name, *(f"{value / GB:.3f}" for value in (*size, sum(size)))))
    for name, size in (
        ("softmax, gathered", plan.gathered),
        ("kept for the backward pass", plan.activations),
        ("softmax, logits", plan.softmax),
        ("backward pass, one layer", plan.working),
        ("peak", plan.memory),
    ):
        lines.append(head.format(name, "", "", "", f"{size / GB:.3f}"))
    lines += [
        "",
        f"sent per token: {plan.all_to_all / plan.tokens:,.0f} bytes to and from experts, "
        f"{plan.dense_exchange / plan.tokens:,.0f} bytes of other weights and gradients",
        f"sent per step: {plan.all_to_all / GB:.3f} GB and {plan.dense_exchange / GB:.3f} GB",
        f"step: {step:.4f} s if nothing overlaps: compute {100 * plan.compute_seconds / step:.1f} %, all-to-all "
        f"{100 * plan.all_to_all_seconds / step:.1f} %, other weights {100 * plan.dense_seconds / step:.1f} %; "
        f"bound by {plan.bound}",
        f"section 3.2: an expert has {compute_to_transfer(config):,.0f} multiply-and-adds for each value of its input "
        f"and output; these devices want more than {needed_compute_to_transfer(cluster, plan.value_bytes):,.0f}",
    ]
    return "\n".join([*lines, *(f"warning: {text}" for text in warnings(plan))])


def warnings(plan: ShardingPlan) -> list[str]:
    """Return the problems of a plan, one line each."""
    config, cluster, texts = plan.config, plan.cluster, []
    if config.num_experts % cluster.devices:
        texts.append(
            f"num_experts={config.num_experts} is not a multiple of devices={cluster.devices}: Transformers refuses it"
        )
    elif config.num_expert_groups and config.num_expert_groups % cluster.devices:
        texts.append(
            f"num_expert_groups={config.num_expert_groups} is not a multiple of devices={cluster.devices}: a group is "
            "spread over several (the paper has each on one)"
        )
    if plan.tokens_per_expert < FEW_TOKENS:
        texts.append(f"{plan.tokens_per_expert:.1f} tokens per expert are few, below {FEW_TOKENS}: a larger batch")
    if compute_to_transfer(config) < needed_compute_to_transfer(cluster, plan.value_bytes) and cluster.devices > 1:
        texts.append("the network is slower than the experts (section 3.2): a larger moe_intermediate_size")
    if cluster.memory is not None and plan.memory > cluster.memory:
        texts.append(f"{plan.memory / GB:.2f} GB are more than the {cluster.memory / GB:.2f} GB of a device")
    return texts
