"""Factored gradients of experts on two processes: the steps of one process, exact norms, bitwise resumption.

Also tests dense steps of `FactoredAdam` on shards.
"""

import copy
import os

import pytest
import torch
import torch.distributed as dist
from processes import on_processes
from tiny_training import ArrayStream, assert_same_bits, noiseless_lm, tiny_arguments, tiny_trainer
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from moe_hf import FactoredAdam, clip_grad_norm_, use_factored_gradients
from moe_hf.data.windows import StreamWindows
from moe_hf.distributed.gathered_rows import gather_rows
from moe_hf.distributed.sharding import distributed_config, shard_new_model
from moe_hf.models.factored_gradients import row_gradients
from moe_hf.training import dense_step
from moe_hf.training.optimizer import expert_parameters

PROCESSES, STEPS, MICRO = 2, 8, 2
MAX_NORM = 0.02  # smaller than any norm of these steps


def new_model(dtype=torch.float64):
    model = noiseless_lm(dtype, num_experts=16)  # a step leaves some experts without a token
    model.set_experts_implementation("moe_hf")
    return model


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.detach()


def take_steps(folder):
    """Clipped and accumulated steps by hand: the norms, and the weights. On several processes, each has its tokens."""
    rank, world_size = (int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1)))
    model = new_model()
    if world_size > 1:
        args = tiny_arguments(folder, expert_parallel_size=world_size)
        model = shard_new_model(lambda whole=model: whole, distributed_config(args))
        assert all(isinstance(parameter, DTensor) for parameter in expert_parameters(model))
    use_factored_gradients(model)
    adam = FactoredAdam.for_model(model, lr=0.01, weight_decay=0.1)
    generator, norms = torch.Generator().manual_seed(0), []
    for _ in range(STEPS):
        for _ in range(MICRO):
            ids = torch.randint(1, 23, (2, 5), generator=generator).chunk(world_size)[rank]
            model(input_ids=ids, labels=ids).loss.backward()
        assert all(p.grad is None and len(row_gradients(p)) == MICRO for p in expert_parameters(model))
        gather_rows(model)
        norms.append(clip_grad_norm_(model, MAX_NORM))
        adam.step()
        adam.zero_grad()
    return torch.stack(norms), {name: whole(weight) for name, weight in model.state_dict().items()}


def test_clipped_steps_are_those_of_one_process(tmp_path):
    norms, weights = take_steps(tmp_path)
    assert norms.min() > MAX_NORM
    for own_norms, own_weights in on_processes(PROCESSES, take_steps, tmp_path):
        torch.testing.assert_close(own_norms, norms, rtol=1e-10, atol=0)
        for name, weight in weights.items():
            torch.testing.assert_close(own_weights[name], weight, rtol=0, atol=1e-10, msg=lambda m: f"{name}: {m}")


def run(folder, resume_from_checkpoint=None):
    arguments = {"optim": "factored_adam", "expert_gradients": "factored", "expert_parallel_size": -1, "max_steps": 4}
    arguments |= {"weight_decay": 0.1, "learning_rate": 0.01, "save_strategy": "steps", "save_steps": 2}
    arguments |= {"per_device_train_batch_size": 1, "max_grad_norm": 0.05}
    args = tiny_arguments(folder, **arguments)
    model = new_model(torch.float32)
    model = shard_new_model(lambda whole=model: whole, distributed_config(args))
    trainer = tiny_trainer(model, StreamWindows(ArrayStream(8 * 7 + 1), 7), folder, **arguments)
    trainer.train(resume_from_checkpoint=resume_from_checkpoint)
    experts = {name: p for name, p in trainer.model.named_parameters() if "experts" in name}
    state = {name: copy.copy(trainer.optimizer.optimizer.state[p]) for name, p in experts.items()}
    return {
        "weights": {name: whole(weight) for name, weight in trainer.model.state_dict().items()},
        "state": {
            name: {key: whole(value) if isinstance(value, torch.Tensor) else value for key, value in values.items()}
            for name, values in state.items()
        },
        "grad_norm": [log["grad_norm"] for log in trainer.state.log_history if "grad_norm" in log],
    }


def run_and_resume(folder):
    return run(folder), run(folder, f"{folder}/checkpoint-2")


def test_a_sharded_run_resumes_bitwise(tmp_path):
    for whole_run, resumed in on_processes(PROCESSES, run_and_resume, tmp_path):
        assert_same_bits(resumed, whole_run)


def step_dense(sharding):
    """A parameter after dense steps of FactoredAdam, and the types and lengths of the pieces that each step takes."""
    torch.manual_seed(0)
    pieces, weight = [], torch.randn(6, 8, 4)
    parameter = torch.nn.Parameter(distribute_tensor(weight, *sharding) if sharding else weight)
    adam, cut = FactoredAdam([parameter], lr=0.1, weight_decay=0.1, factored=True), dense_step._chunks
    dense_step._chunks = lambda *tensors: (pieces.append((type(p[0]), len(p[0]))) or p for p in cut(*tensors))
    try:
        for _ in range(3):
            gradient = torch.randn(weight.shape)
            parameter.grad = distribute_tensor(gradient, *sharding) if sharding else gradient
            adam.step()
    finally:
        dense_step._chunks = cut
    return whole(parameter), pieces


def steps_with_and_without_sharding():
    dense_step.CHUNK_BYTES = {"cpu": 2 * 8 * 4 * 4}
    mesh = init_device_mesh("cpu", (1,), mesh_dim_names=("ep",))
    return step_dense((mesh, [Shard(0)])), step_dense(None)


def test_dense_steps_of_sharded_experts_take_a_piece_at_a_time():
    [(sharded, plain)] = on_processes(1, steps_with_and_without_sharding)
    assert torch.equal(sharded[0], plain[0])
    assert set(sharded[1]) == set(plain[1]) == {(torch.Tensor, 2)}


def shard_by_fsdp():
    dist.init_process_group("gloo")
    model = fully_shard(new_model())
    with pytest.raises(ValueError, match="use_factored_gradients: experts sharded by FSDP have dense gradients"):
        use_factored_gradients(model)
    return True


def test_experts_sharded_by_fsdp_are_refused():
    assert on_processes(1, shard_by_fsdp) == [True]
