"""The cost model of sharded training against models on the meta device, real optimizers and what autograd keeps."""

from pathlib import Path

import pytest
import torch
from tiny_models import GNMT, LM, random_ids, tiny_gnmt_config, tiny_lm_config
from torch.distributed._tools.mem_tracker import MemTracker
from transformers import GPT2Config

from moe_hf import GnmtMoeConfig, LstmMoeConfig, LstmMoeForCausalLM, use_factored_gradients
from moe_hf.commands import plan as script
from moe_hf.commands.plan import paper_memory_table
from moe_hf.data.arguments import TranslationDataArguments
from moe_hf.distributed.plan import (
    Cluster,
    activation_values,
    all_to_all_values,
    compute_to_transfer,
    needed_compute_to_transfer,
    plan_sharding,
    step_flops,
)
from moe_hf.distributed.plan_report import describe
from moe_hf.errors import InputError
from moe_hf.evaluation import count_embedding_parameters, count_parameters
from moe_hf.experiments.paper_tables import BILLION_WORDS_100
from moe_hf.models.factored_gradients import row_gradients
from moe_hf.training.arguments import MoeTrainingArguments, parse_arguments
from moe_hf.training.optimizer import create_factored_adam, expert_parameters, state_bytes
from moe_hf.training.plan_file import LM_ARGUMENTS, TRANSLATION_ARGUMENTS, read_config

ROOT = Path(__file__).parents[2]
PAPER = {row.config: row for row in BILLION_WORDS_100}
ONE = Cluster(1, flops=1, bandwidth=1)
FAMILIES = {"lstm_moe": LM, "gnmt_moe": GNMT}


@pytest.mark.parametrize("devices", [1, 8, 128])
@pytest.mark.parametrize("name", PAPER)
def test_parameters_of_all_devices_are_the_models(name, devices):
    config = read_config(ROOT / "configs" / "lm" / name)
    plan = plan_sharding(config, Cluster(devices, 1, 1), tokens=1)
    parameters = (plan.experts.parameters + plan.dense.parameters + plan.embeddings.parameters) * devices / 4
    if config.num_experts % devices == 0 or "moe" not in config.layer_pattern:
        assert parameters == pytest.approx(count_parameters(config) + count_embedding_parameters(config))
        assert PAPER[name].has_params(round((plan.experts.parameters + plan.dense.parameters) * devices / 4))
    else:
        assert parameters > count_parameters(config) + count_embedding_parameters(config)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("optimizer", ["adam", "factored_adam"])
@pytest.mark.parametrize("family", FAMILIES)
def test_optimizer_state_is_the_real_one(family, optimizer, dtype, tmp_path):
    model = FAMILIES[family].model(dtype, num_experts=6, moe_intermediate_size=10).train()
    model.tie_weights()
    args = MoeTrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    if optimizer == "adam":
        real = torch.optim.AdamW(model.parameters(), fused=True)
    else:
        real = create_factored_adam(model, args, [])
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    real.step()
    experts = expert_parameters(model)
    others = set(model.parameters()).difference(experts)
    plan = plan_sharding(model.config, ONE, 1, optimizer, dtype.itemsize)
    counters = 4 * len(others), 4 * len(experts) if optimizer == "adam" else 0  # a step counter for each tensor
    assert state_bytes(real, others) == plan.dense.optimizer + plan.embeddings.optimizer + counters[0]
    assert state_bytes(real, experts) == plan.experts.optimizer + counters[1]
    assert plan.experts.gradients == sum(param.grad.nbytes for param in experts)


def kept_values(model, config, tokens):
    """Numbers of floating-point type that autograd keeps for the layers, each storage once, parameters not."""
    storages, own = {}, {param.untyped_storage().data_ptr() for param in model.parameters()}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if tensor.is_floating_point() and storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage.nbytes() // tensor.element_size()
        kept.append(tensor)  # otherwise the memory would be reused
        return tensor

    kept, layers = [], model.model.layers
    hidden_states = torch.randn(1, tokens, config.hidden_size, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        for layer in layers:
            hidden_states = layer(hidden_states)[0]
    return sum(storages.values())


@pytest.mark.parametrize(
    "changes",
    [{}, {"gating": "softmax_top_k"}, {"recompute_experts": True}, {"num_experts_per_tok": 2}, {"hidden_size": 24}],
)
def test_activations_are_what_autograd_keeps(changes):
    # With a projection the LSTM is our kernel; torch's CPU kernel does not show what it keeps.
    sizes = dict(hidden_size=16, lstm_hidden_size=20, num_experts=9, num_experts_per_tok=3, moe_intermediate_size=28)
    config = LstmMoeConfig(vocab_size=30, dropout=0.0, **(sizes | changes))
    model = LstmMoeForCausalLM(config).train()
    of_40_tokens = kept_values(model, config, 60) - kept_values(model, config, 20)  # less the states of the LSTMs
    assert of_40_tokens == 40 * activation_values(config, is_sharded=False)


@pytest.mark.parametrize(("family", "layers"), [("lstm_moe", 1), ("gnmt_moe", 2)])
def test_rows_instead_of_gradients_are_the_real_ones(family, layers):
    model = FAMILIES[family].model(torch.float32, moe_intermediate_size=12, gating="softmax_top_k").train()
    model.set_experts_implementation("moe_hf")
    use_factored_gradients(model)
    ids = random_ids(4, 9)
    model(input_ids=ids, labels=ids).loss.backward()
    rows = [part for param in expert_parameters(model) for part in row_gradients(param)]
    assert len(rows) == 2 * layers
    real = sum(part.left.nbytes + part.right.nbytes for part in rows)
    assert plan_sharding(model.config, ONE, ids.numel(), expert_gradients="factored").experts.gradients == real


def test_sharded_experts_keep_the_rows_that_move_too():
    config = tiny_lm_config()
    moved = activation_values(config) - activation_values(config, is_sharded=False)
    assert moved == 2 * config.num_experts_per_tok * config.hidden_size


@pytest.mark.parametrize(("family", "layers"), [("lstm_moe", 1), ("gnmt_moe", 2)])
def test_a_token_moves_4_k_d_values_for_each_layer(family, layers):
    config = FAMILIES[family].config(num_experts_per_tok=3, hidden_size=24)
    assert all_to_all_values(config) == layers * 4 * 3 * 24
    again = FAMILIES[family].config(num_experts_per_tok=3, hidden_size=24, recompute_experts=True)
    assert all_to_all_values(again) == layers * 6 * 3 * 24
    assert step_flops(again) - step_flops(config) == layers * 2 * 3 * 2 * 24 * config.moe_intermediate_size


def test_bandwidth_rule_is_where_an_experts_compute_takes_as_long_as_its_transfer():
    assert compute_to_transfer(tiny_lm_config(moe_intermediate_size=56)) == 56
    cluster = Cluster(10**6, flops=28e9, bandwidth=1e9)  # 14e9 multiply-and-adds, 250e6 values: 56 for each
    assert needed_compute_to_transfer(cluster) == 56
    plan, half = (plan_sharding(tiny_lm_config(moe_intermediate_size=h), cluster, 100) for h in (56, 28))
    experts = 2 * (plan.compute_seconds - half.compute_seconds)
    # The rule is for the forward pass; a training step has three times the operations and twice the transfer.
    assert experts / 3 == pytest.approx(plan.all_to_all_seconds / 2, rel=1e-5)
    deep = tiny_lm_config(moe_intermediate_size=16, num_expert_layers=2)
    assert compute_to_transfer(deep) == (2 * 8 * 16 + 16 * 16) / (2 * 8)


def test_one_device_moves_nothing():
    plan = plan_sharding(tiny_lm_config(), ONE, 10)
    assert plan.all_to_all == plan.dense_exchange == plan.gathered == 0 and plan.bound == "compute"


def test_the_largest_model_of_the_paper():
    config = read_config(ROOT / "configs" / "lm" / "100b-moe-131072-h.yaml")
    plan = plan_sharding(config, Cluster(128, 1e12, 1e9), 2_500_000 // 128)
    assert plan.experts_per_device == 1024 and round(plan.tokens_per_expert) == 76
    assert plan.experts.parameters == 1024 * 2 * 512 * 1024 * 4
    assert plan.experts.optimizer == 1024 * 2 * (512 + 1024) * 4
    # "to have enough memory for all the parameters": 12 GB hold the experts with the factored optimizer alone.
    adam = plan_sharding(config, Cluster(128, 1e12, 1e9), 2_500_000 // 128, "adam")
    assert sum(plan.experts) < 12e9 < sum(adam.experts)


def run(capsys, *argv):
    status = script.main(list(argv))
    return status, capsys.readouterr()


def test_command_prints_a_plan_of_a_file(capsys):
    file = str(ROOT / "configs" / "lm" / "100b-moe-131072-h.yaml")
    status, output = run(capsys, file, "--devices", "128", "--tokens", "19531", "--memory", "11")
    assert status == 0
    assert "experts per device: 1,024; tokens per expert: 76.3" in output.out
    assert f"sent per token: {6 * 4 * 512 * 4 * 127 / 128:,.0f} bytes" in output.out
    assert "11.30 GB are more than the 11.00 GB of a device" in output.out
    assert "multiple" not in output.out


def test_command_prints_a_plan_of_sizes(capsys):
    sizes = ["--num_experts", "131072", "--num_expert_groups", "256", "--hidden_size", "256", "--vocab_size", "1000"]
    status, output = run(capsys, *sizes, "--devices", "48", "--tokens", "100")
    assert status == 0
    assert "experts per device: 2,731" in output.out
    assert "warning: num_experts=131072 is not a multiple of devices=48: Transformers refuses it" in output.out
    assert "warning: 0.1 tokens per expert are few" in output.out
    status, output = run(capsys, *sizes, "--devices", "512")
    assert "warning: num_expert_groups=256 is not a multiple of devices=512" in output.out


@pytest.mark.parametrize(
    ("lines", "argv", "expected"),
    [
        ("optim: factored_adam\n", [], "optimizer: factored_adam; gradients of experts: dense"),
        ("optim: adamw_torch_fused\n", [], "optimizer: adam; gradients of experts: dense"),
        ("", [], "optimizer: adam; gradients of experts: dense"),
        (
            "optim: factored_adam\nexpert_gradients: factored\n",
            [],
            "optimizer: factored_adam; gradients of experts: factored",
        ),
        (
            "optim: factored_adam\nexpert_gradients: factored\n",
            ["--optimizer", "adam", "--expert_gradients", "dense"],
            "optimizer: adam; gradients of experts: dense",
        ),
        ("optim: adafactor\n", ["--optimizer", "adam"], "optimizer: adam; gradients of experts: dense"),
        (None, [], "optimizer: factored_adam; gradients of experts: dense"),
    ],
)
def test_the_optimizer_of_the_file_is_planned(lines, argv, expected, tmp_path, capsys):
    if lines is not None:
        (tmp_path / "model.yaml").write_text("num_experts: 32\n" + lines)
        argv = [str(tmp_path / "model.yaml"), *argv]
    status, output = run(capsys, *argv)
    assert status == 0 and output.out.splitlines()[1].endswith(expected)


@pytest.mark.parametrize("folder", ["lm", "translation"])
def test_the_model_of_the_file_is_planned(folder):
    for file in sorted((ROOT / "configs" / folder).glob("*.yaml")):
        of_lm = folder == "lm"
        model, data, _ = parse_arguments(
            [str(file), "--use_cpu", "true"], LM_ARGUMENTS if of_lm else TRANSLATION_ARGUMENTS
        )
        config_class = LstmMoeConfig if of_lm else GnmtMoeConfig
        expected = config_class(vocab_size=data.vocab_size, **model.config_arguments())
        assert read_config(file).to_dict() == expected.to_dict()


def test_a_file_without_sizes_has_the_defaults_of_its_command(tmp_path):
    (tmp_path / "lm.yaml").write_text("train_files: [a.txt]\n")
    (tmp_path / "translation.yaml").write_text("train_source_files: [a.txt]\n")
    assert read_config(tmp_path / "lm.yaml").to_dict() == LstmMoeConfig(vocab_size=16000).to_dict()
    config = read_config(tmp_path / "translation.yaml")
    assert config.to_dict() == GnmtMoeConfig(vocab_size=TranslationDataArguments.vocab_size).to_dict()


def test_the_model_that_a_file_continues_is_planned(tmp_path):
    tiny_gnmt_config(num_experts=6).save_pretrained(tmp_path)
    (tmp_path / "run.yaml").write_text(f"model_name_or_path: {tmp_path}\ntrain_source_files: [a.txt]\n")
    assert read_config(tmp_path / "run.yaml").num_experts == 6
    GPT2Config(n_layer=1).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="model_name_or_path=.* has model_type='gpt2'"):
        read_config(tmp_path / "run.yaml")


def test_a_name_that_is_no_argument_is_refused(tmp_path):
    (tmp_path / "run.yaml").write_text("num_expert: 1024\n")
    with pytest.raises(InputError, match="run.yaml: no argument of moe-hf train-lm is named 'num_expert'"):
        read_config(tmp_path / "run.yaml")


def test_an_optimizer_without_a_plan_is_refused(tmp_path, capsys):
    (tmp_path / "model.yaml").write_text("optim: adafactor\n")
    status, output = run(capsys, str(tmp_path / "model.yaml"))
    assert status == 1 and "has no plan, give --optimizer adam or factored_adam" in output.err


def test_a_sound_plan_has_no_warnings():
    config = tiny_lm_config(num_experts=8, moe_intermediate_size=512)
    text = describe(plan_sharding(config, Cluster(4, flops=1e12, bandwidth=1e10, memory=1e9), 10_000))
    assert "warning" not in text and "bound by compute" in text


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["missing.yaml"], "configuration file missing.yaml does not exist"),
        (["--devices", "0"], "devices=0 must be at least 1"),
        (["--bandwidth", "0"], "bandwidth=0 must be above 0"),
        (["--tokens", "0"], "tokens=0 must be at least 1"),
        (["--value_bytes", "0"], "value_bytes=0 must be at least 1"),
        (["--optimizer", "sgd"], "optimizer='sgd' is not known, use adam or factored_adam"),
        (["--expert_gradients", "rows"], "expert_gradients='rows' is not known, use dense or factored"),
        (["--num_experts", "2"], "num_experts_per_tok=4 exceeds num_experts=2"),
    ],
)
def test_bad_input_is_one_line(argv, message, capsys):
    status, output = run(capsys, *argv)
    assert status == 1 and message in output.err and len(output.err.splitlines()) == 1


def test_a_file_that_is_no_mapping_is_refused(tmp_path):
    (tmp_path / "list.yaml").write_text("- 1\n")
    with pytest.raises(InputError, match="list.yaml holds list, expected"):
        read_config(tmp_path / "list.yaml")


def test_the_documented_table_is_what_the_command_prints():
    documented = (ROOT / "docs" / "scale.md").read_text(encoding="utf-8")
    table = paper_memory_table(ROOT / "configs" / "lm")
    assert table in documented and len(table.splitlines()) == 2 + len(PAPER)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"vocab_size": 4000},
        {"moe_intermediate_size": 256},
        {"recompute_experts": True},
        {"gating": "noisy_top_k", "num_experts": 64},
    ],
    ids=["as it is", "the softmax is the largest part", "large experts", "recomputed experts", "noisy gate"],
)
def test_memory_is_the_peak_of_a_step(changes):
    sizes = dict(hidden_size=64, lstm_hidden_size=80, num_experts=16, num_experts_per_tok=4, moe_intermediate_size=96)
    config = LstmMoeConfig(**(dict(vocab_size=500, dropout=0.0, gating="softmax_top_k") | sizes | changes))
    model = LstmMoeForCausalLM(config).train()
    ids = random_ids(64, 32, vocab_size=500)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)

    def step():
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step()  # creates the optimizer's state
    tracker = MemTracker()
    tracker.track_external(model, optimizer)
    with tracker:
        step()
    (peak,) = (snapshot["Total"] for snapshot in tracker.get_tracker_snapshot("peak").values())
    assert plan_sharding(config, ONE, ids.numel(), "adam").memory == pytest.approx(peak, rel=0.1)
