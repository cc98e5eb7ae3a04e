"""Estimates memory, communication and time of a model with one copy of each expert over several devices (section 3).

The layout is `DistributedConfig(fsdp_size=P, ep_size=P)`. Each of P devices has the same number of tokens, and n / P
experts, which tokens reach by an all-to-all. All other weights are split into P parts, and every device gathers them
when needed. docs/scale.md has the formulas, and benchmarks/sharding.py measures the bytes.

Letters: d width, h an expert's hidden size, k experts per token, n experts, P devices, T tokens of a device and step.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch

from ..errors import InputError
from ..model_size import count_embedding_parameters, count_parameters, layers_without_memory, ops_per_timestep
from ..models.configuration_moe import MoeConfig
from ..models.experts import MoeExperts
from ..models.lstm import Lstm
from ..models.moe import MoeBlock

OPTIMIZERS = ("adam", "factored_adam")
EXPERT_GRADIENTS = ("dense", "factored")
FLOAT32 = 4
VALUES_PER_NOISY_LOGIT = 5  # clean and noisy logit, deviation, probability and others; a test counts them


@dataclass(frozen=True)
class Cluster:
    """Equal devices.

    Args:
        devices: number of devices.
        flops: floating-point operations per second of each device; a multiply-add is two operations.
        bandwidth: bytes per second that each device can send while receiving the same amount.
        memory: bytes of memory of each device; None: not checked.
    """

    devices: int
    flops: float
    bandwidth: float
    memory: float | None = None

    def __post_init__(self):
        if self.devices < 1:
            raise InputError(f"devices={self.devices} must be at least 1")
        for name in ("flops", "bandwidth", "memory"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise InputError(f"{name}={value} must be above 0")

    @property
    def remote_share(self) -> float:
        """Return the share of all shards that a device does not have: (P - 1) / P."""
        return (self.devices - 1) / self.devices


class Bytes(NamedTuple):
    """Bytes on one device, for one kind of weights."""

    parameters: float
    gradients: float
    optimizer: float


@dataclass(frozen=True)
class ShardingPlan:
    """A device's share of a training step. Only sent bytes count; the device receives the same amount."""

    config: MoeConfig
    cluster: Cluster
    tokens: int
    optimizer: str
    expert_gradients: str
    value_bytes: int
    experts: Bytes
    dense: Bytes  # layers without experts
    embeddings: Bytes  # embedding and softmax
    gathered: float  # the largest matrix of the rest, whole, and its gradient
    activations: float  # kept for the backward pass
    softmax: float  # logits, their logarithms and their gradient
    working: float  # of the backward pass of one MoE layer, buffers of the exchange included
    all_to_all: float  # bytes of a step
    dense_exchange: float  # bytes of a step
    compute_seconds: float
    all_to_all_seconds: float
    dense_seconds: float

    @property
    def experts_per_device(self) -> int:
        """n / P, rounded up."""
        return math.ceil(self.config.num_experts / self.cluster.devices)

    @property
    def tokens_per_expert(self) -> float:
        """k T P / n, the global batch."""
        return self.config.num_experts_per_tok * self.tokens * self.cluster.devices / self.config.num_experts

    @property
    def memory(self) -> float:
        """The peak, in bytes: the logits are gone when the first gradients of weights are made."""
        weights = (self.experts, self.dense, self.embeddings)
        at_all_times = sum(kind.parameters + kind.optimizer for kind in weights) + self.gathered + self.activations
        return at_all_times + max(self.softmax, sum(kind.gradients for kind in weights) + self.working)

    @property
    def bound(self) -> str:
        """Return the part of a step that takes the most time."""
        seconds = {
            "compute": self.compute_seconds,
            "all-to-all": self.all_to_all_seconds,
            "exchange of dense weights": self.dense_seconds,
        }
        return max(seconds, key=seconds.get)


def plan_sharding(
    config: MoeConfig,
    cluster: Cluster,
    tokens: int,
    optimizer: str = "factored_adam",
    value_bytes: int = FLOAT32,
    expert_gradients: str = "dense",
) -> ShardingPlan:
    """Plan a training step whose experts are spread over devices.

    Args:
        config: a configuration of either family. A token of a translation model is one source and one target token.
        cluster: the devices.
        tokens: T, the number of tokens of each device.
        optimizer: "adam", or "factored_adam", which is factored for the experts and Adam for the rest.
        value_bytes: bytes of a parameter, gradient, activation or moment; factored moments always have 4.
        expert_gradients: "dense", or "factored" for the rows of `use_factored_gradients`.

    Raises:
        InputError: tokens or value_bytes is below 1, or the optimizer or the kind of gradients is not known.
    """
    for name, value in (("tokens", tokens), ("value_bytes", value_bytes)):
        if value < 1:
            raise InputError(f"{name}={value} must be at least 1")
    if optimizer not in OPTIMIZERS:
        raise InputError(f"optimizer={optimizer!r} is not known, use {' or '.join(OPTIMIZERS)}")
    if expert_gradients not in EXPERT_GRADIENTS:
        raise InputError(f"expert_gradients={expert_gradients!r} is not known, use {' or '.join(EXPERT_GRADIENTS)}")
    experts = expert_weights(config)
    num_experts = sum(param.numel() for param in experts)
    num_dense, num_embedding = count_parameters(config) - num_experts, count_embedding_parameters(config)

    def of_device(number: int, share: float) -> Bytes:
        return Bytes(*(times * number * share * value_bytes for times in (1, 1, 2)))  # Adam keeps two moments

    share = math.ceil(config.num_experts / cluster.devices) / config.num_experts
    expert_bytes = of_device(num_experts, share)
    if optimizer == "factored_adam":
        expert_bytes = expert_bytes._replace(optimizer=sum(factored_bytes(param.shape) for param in experts) * share)
    if expert_gradients == "factored":
        expert_bytes = expert_bytes._replace(gradients=row_values(config) * tokens * value_bytes)
    is_sharded = cluster.devices > 1
    logits = min(getattr(config, "loss_chunk_size", None) or tokens, tokens) * num_classes(config)
    all_to_all = all_to_all_values(config) * tokens * value_bytes * cluster.remote_share
    exchange = dense_exchange_values(config) * value_bytes * cluster.remote_share
    return ShardingPlan(
        config=config,
        cluster=cluster,
        tokens=tokens,
        optimizer=optimizer,
        expert_gradients=expert_gradients,
        value_bytes=value_bytes,
        experts=expert_bytes,
        dense=of_device(num_dense, 1 / cluster.devices),
        embeddings=of_device(num_embedding, 1 / cluster.devices),
        gathered=2 * config.vocab_size * config.hidden_size * value_bytes if is_sharded else 0,
        activations=tokens * activation_values(config, is_sharded) * value_bytes,
        softmax=3 * logits * value_bytes,
        working=tokens * working_values(config, is_sharded, expert_gradients == "factored") * value_bytes,
        all_to_all=all_to_all,
        dense_exchange=exchange,
        compute_seconds=step_flops(config) * tokens / cluster.flops,
        all_to_all_seconds=all_to_all / cluster.bandwidth,
        dense_seconds=exchange / cluster.bandwidth,
    )


def expert_weights(config: MoeConfig) -> list[torch.Tensor]:
    """Return the experts' parameters, on the meta device."""
    modules = layers_without_memory(config).modules()
    return [param for module in modules if isinstance(module, MoeExperts) for param in module.parameters()]


def factored_bytes(shape: torch.Size) -> int:
    """Return the bytes of the row and column means of `FactoredAdam` for stacked matrices (..., H, D)."""
    number = math.prod(shape)
    return FLOAT32 * (number // shape[-1] + number // shape[-2])


def row_values(config: MoeConfig) -> int:
    """Return the number of values per token in factored gradients: 2 k (d + h) for each MoE layer.

    Each of the two matrices of an expert has a row of inputs, and a row of gradients at its outputs.
    """
    width, hidden = config.hidden_size, config.moe_intermediate_size
    return 2 * config.num_experts_per_tok * (width + hidden) * num_moe_layers(config)


def expert_ops(config: MoeConfig) -> int:
    """Return the multiply-adds of an expert for one token: 2 d h, plus h^2 for every further hidden layer."""
    hidden = config.moe_intermediate_size
    return 2 * config.hidden_size * hidden + (config.num_expert_layers - 1) * hidden**2


def compute_to_transfer(config: MoeConfig) -> float:
    """Return an expert's multiply-adds per value of its input and output (section 3.2): h for one hidden layer."""
    return expert_ops(config) / (2 * config.hidden_size)


def needed_compute_to_transfer(cluster: Cluster, value_bytes: int = FLOAT32) -> float:
    """Return a device's multiply-adds per second, divided by the values that it can send per second.

    If `compute_to_transfer` exceeds this number, the experts and not the network limit the speed (section 3.2).
    """
    return (cluster.flops / 2) / (cluster.bandwidth / value_bytes)


def num_moe_layers(config: MoeConfig) -> int:
    """Return the number of MoE layers of the model."""
    return sum(isinstance(module, MoeExperts) for module in layers_without_memory(config).modules())


def all_to_all_values(config: MoeConfig) -> int:
    """Return the values that a training step moves per token if all experts are remote: 4 k d for each MoE layer.

    The forward pass moves 2 k d values: k copies of the input to the experts, and k outputs back. The backward pass
    moves the same number of gradients. With `recompute_experts` the total is 6 k d, because the backward pass repeats
    the experts' forward pass and both of its exchanges.
    """
    passes = 3 if config.recompute_experts else 2
    return passes * 2 * config.num_experts_per_tok * config.hidden_size * num_moe_layers(config)


def dense_exchange_values(config: MoeConfig) -> int:
    """Return the values of non-expert weights that a step gathers, plus the gradients that it reduces and scatters.

    Every weight is gathered for the forward pass, and again for the backward pass. The softmax's weight is gathered
    once and kept. A weight's gradient goes to the device with that part of the weight. An embedding that source and
    target share is gathered twice.
    """
    num_softmax = config.vocab_size * config.hidden_size
    num_experts = sum(param.numel() for param in expert_weights(config))
    num_dense = count_parameters(config) - num_experts + count_embedding_parameters(config)
    return 3 * num_dense - num_softmax + (num_softmax if getattr(config, "share_embeddings", False) else 0)


def num_classes(config: MoeConfig) -> int:
    """Return the number of classes of the softmax while training."""
    return getattr(config, "num_sampled", None) or config.vocab_size


def step_flops(config: MoeConfig) -> int:
    """Return a training step's floating-point operations per token: forward, twice that backward, recomputation."""
    forward = ops_per_timestep(config) + num_classes(config) * config.hidden_size
    experts = config.num_experts_per_tok * expert_ops(config) * num_moe_layers(config)
    return 2 * (3 * forward + (experts if config.recompute_experts else 0))


def activation_values(config: MoeConfig, is_sharded: bool = True) -> int:
    """Return the values per token that the layers keep for the backward pass, without ids, masks and dropout.

    An LSTM keeps its input, 4 gates and the cell (5 units), and its output. A MoE layer keeps input and output (2 d),
    the gate's k values, and values for each of the gate's logits. Unless the experts are recomputed, a MoE layer also
    keeps their hidden units (k h) and, if sharded, the exchanged inputs and outputs (2 k d).

    Args:
        config: a configuration of either family.
        is_sharded: whether the experts are spread over devices.
    """
    width, k, total = config.hidden_size, config.num_experts_per_tok, 0
    for module in layers_without_memory(config).modules():
        if isinstance(module, Lstm):
            total += module.weight_ih.shape[1] + 5 * module.units + width
        elif isinstance(module, MoeBlock):
            total += 2 * width + k + _gate_values(config)
            if not config.recompute_experts:
                total += k * (config.num_expert_layers * config.moe_intermediate_size + (2 * width * is_sharded))
    return total


def working_values(config: MoeConfig, is_sharded: bool = True, is_factored: bool = False) -> int:
    """Values that the backward pass of one MoE layer holds for a moment for each token.

    These are the k rows of the inputs and of both their gradients (3 d), the hidden units of recomputed experts (h),
    and the gradients at the hidden units where they stand for the experts' own (h). When sharded, the exchange has a
    buffer to send and one to receive (2 d).
    """
    num_hidden = config.recompute_experts * config.num_expert_layers + is_factored
    values = (5 if is_sharded else 3) * config.hidden_size + num_hidden * config.moe_intermediate_size
    return config.num_experts_per_tok * values


def _gate_values(config: MoeConfig) -> int:
    """Return the values per token that a gate keeps: for a noisy gate, several for each logit that it computes."""
    if config.gating == "strictly_balanced":
        return 3 * config.num_experts
    if config.gating != "noisy_top_k":
        return 0
    if config.num_expert_groups is None:
        return VALUES_PER_NOISY_LOGIT * config.num_experts
    chosen, groups = config.num_groups_per_tok, config.num_expert_groups
    return VALUES_PER_NOISY_LOGIT * (groups + chosen * config.num_experts // groups) + chosen * config.hidden_size
