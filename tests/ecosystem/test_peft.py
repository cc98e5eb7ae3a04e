"""PEFT's adapters on the models: results, trained weights, and stability under merging, saving and loading."""

import pytest
import torch
from peft import (
    AutoPeftModelForCausalLM,
    AutoPeftModelForSequenceClassification,
    LoraConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
)
from tiny_models import assert_same, padded, random_ids, randomize, sentences, tiny_gnmt, tiny_lm, tiny_lm_config
from tiny_training import ArrayStream, noiseless_lm, tiny_trainer
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import moe_hf
from moe_hf.data.windows import StreamWindows
from moe_hf.routing.observe import routing_totals
from moe_hf.training.arguments import TranslationTrainingArguments
from moe_hf.training.callbacks import STATISTICS, AuxLossCallback
from moe_hf.training.translation_trainer import TranslationTrainer

# PEFT 0.21.2 reads the name that Transformers 5.23 deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

EXPERTS = ["experts.up_proj", "experts.down_proj"]
HIERARCHICAL = {"num_experts": 6, "num_expert_groups": 3, "num_experts_per_tok": 4}
# name: (changes of the configuration, modules with adapters)
LM = {
    "experts": ({}, {"target_parameters": EXPERTS}),
    "one expert": ({"num_experts": 1, "num_experts_per_tok": 1}, {"target_parameters": EXPERTS}),
    "gate": ({}, {"target_parameters": ["gate.weight", "gate.noise_weight"]}),
    "hierarchical gate": (HIERARCHICAL, {"target_parameters": ["gate.weight", *EXPERTS]}),
    "primary gate": (HIERARCHICAL, {"target_parameters": ["gate.primary.weight", *EXPERTS]}),
    "strictly balanced gate": ({"gating": "strictly_balanced"}, {"target_parameters": ["gate.weight", *EXPERTS]}),
    "softmax": ({}, {"target_modules": ["lm_head"]}),
    "weight of the softmax": ({"loss_chunk_size": 3}, {"target_parameters": ["lm_head.weight"]}),
    "embedding": ({"scale_embedding": True}, {"target_modules": ["embed_tokens"]}),
    "LSTM": ({"lstm_hidden_size": 5}, {"target_parameters": ["weight_ih", "weight_hh", "weight_hr"]}),
}
GNMT = {
    "experts": ({}, {"target_parameters": EXPERTS}),
    "softmax and embedding": ({"scale_embedding": True}, {"target_modules": ["lm_head", "embed_tokens"]}),
    "LSTM": ({}, {"target_parameters": ["weight_ih", "weight_hh"]}),
    "LSTM, parallel feeding": ({"attention_feeding": "parallel"}, {"target_parameters": ["weight_ih"]}),
    "attention": ({}, {"target_parameters": ["attention.source_weight", "attention.query_weight"]}),
}
CASES = [("lm", name) for name in LM] + [("gnmt", name) for name in GNMT]
FAMILY_AND_CASE = pytest.mark.parametrize("family, case", CASES, ids=[f"{family}: {name}" for family, name in CASES])


def base_model(family, case="experts", **changes):
    config, _ = (LM if family == "lm" else GNMT)[case]
    make_model = tiny_lm if family == "lm" else tiny_gnmt
    return make_model(std=0.4, **(config | changes))


def adapted(model, targets, seed=1, **options):
    """The model with adapters that are not zero, in the state (train or eval) of the model."""
    torch.manual_seed(seed)
    training = model.training
    options = {"r": 2, "lora_alpha": 3, "init_lora_weights": False, "target_modules": []} | targets | options
    config = LoraConfig(task_type="SEQ_2_SEQ_LM" if model.config.is_encoder_decoder else "CAUSAL_LM", **options)
    return get_peft_model(model, config).double().train(training)


def batch(family):
    if family == "lm":
        ids, mask = random_ids(3, 7), torch.ones(3, 7, dtype=torch.long)
        mask[0, :2] = 0
        return {"input_ids": ids, "attention_mask": mask, "labels": ids}
    source, mask = padded(sentences(5, 3), 5)
    target, _ = padded(sentences(4, 2, seed=1), 4, value=-100)
    return {"input_ids": source, "attention_mask": mask, "labels": target}


def changed_weights(model) -> dict[str, torch.Tensor]:
    """{name in the base model: W + scaling * B A} of every adapted weight, written out by hand."""
    names = {id(module): name for name, module in model.named_modules()}
    weights = {}
    for module in model.modules():
        if not hasattr(module, "lora_A"):
            continue
        scale, base = module.scaling["default"], module.get_base_layer()
        parameter = getattr(module, "parameter_name", "weight")
        name = names[id(base)].removeprefix("base_model.model.").replace(".base_layer", "") + f".{parameter}"
        weight = getattr(base, parameter)
        if "default" in module.lora_embedding_A:
            change = (module.lora_embedding_B["default"] @ module.lora_embedding_A["default"]).T
        else:
            a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
            if weight.dim() == 3:  # rows of a by expert and rank, columns of b by rank and expert
                a = a.view(len(weight), 2, -1)
                b = b.view(weight.shape[1], 2, len(weight)).permute(2, 0, 1)
            change = b @ a
        assert change.shape == weight.shape and change.abs().min() > 0, name
        weights[name] = weight + scale * change
    return weights


def trained_parameters(model) -> dict[str, torch.Tensor]:
    return {name: param for name, param in model.named_parameters() if param.requires_grad}


@FAMILY_AND_CASE
@pytest.mark.parametrize("experts", ["eager", "moe_hf"])
@pytest.mark.parametrize("training", [True, False])
def test_adapters_are_the_changed_weights_with_their_gradients(family, case, experts, training):
    model = base_model(family, case).train(training)
    if experts != "eager":
        model.set_experts_implementation(experts)
    _, targets = (LM if family == "lm" else GNMT)[case]
    inputs = batch(family)
    wrapped = adapted(model, targets)
    parameters = trained_parameters(wrapped)
    assert all("lora_" in name for name in parameters)
    torch.manual_seed(5)
    loss = wrapped(**inputs).loss
    actual = torch.autograd.grad(loss, list(parameters.values()), materialize_grads=True)

    weights = changed_weights(wrapped)
    reference = base_model(family, case).train(training)
    assert set(weights) <= set(dict(reference.named_parameters()))
    torch.manual_seed(5)
    expected = torch.func.functional_call(reference, weights, kwargs=inputs).loss
    assert_same(loss, expected)
    assert_same(actual, torch.autograd.grad(expected, list(parameters.values()), materialize_grads=True))
    without_noise = case == "gate" and not training  # in evaluation the noise's adapters do not get a gradient
    assert without_noise or all(grad.abs().max() > 0 for grad in actual)


@FAMILY_AND_CASE
def test_merged_is_what_it_was(family, case):
    _, targets = (LM if family == "lm" else GNMT)[case]
    model = adapted(base_model(family, case), targets)
    inputs = batch(family)
    expected = model(**inputs)
    with model.disable_adapter():
        assert (model(**inputs).loss - expected.loss).abs() > 1e-4
    merged = model.merge_and_unload()
    assert type(merged) is type(base_model(family, case))
    assert merged.state_dict().keys() == base_model(family, case).state_dict().keys()
    assert_same(merged(**inputs).loss, expected.loss)
    if expected.logits is not None:
        assert_same(merged(**inputs).logits, expected.logits)


@pytest.mark.parametrize("recompute", ["experts", "layers"])
def test_recomputation_computes_with_the_adapters_again(recompute):
    results = []
    for how in (None, recompute):
        model = base_model("lm", recompute_experts=how == "experts").train()
        model = adapted(model, {"target_parameters": [*EXPERTS, "gate.weight"]})
        if how == "layers":
            model.activation_checkpointing_enable()
        torch.manual_seed(5)
        loss = model(**batch("lm")).loss
        results.append(torch.autograd.grad(loss, list(trained_parameters(model).values())))
    assert_same(*results)
    assert all(grad.abs().max() > 0 for grad in results[0])


@pytest.mark.parametrize("gating", ["noisy_top_k", "strictly_balanced"])
def test_gates_can_be_trained_whole_beside_adapters(gating, tmp_path):
    model = adapted(base_model("lm", gating=gating), {"target_parameters": EXPERTS}, modules_to_save=["gate"])
    names = set(trained_parameters(model))
    assert any("gate.modules_to_save" in name for name in names) and any("lora_A" in name for name in names)
    with torch.no_grad():
        for name, parameter in trained_parameters(model).items():
            if "gate" in name:
                parameter.mul_(1.5)
    expected = model(**batch("lm")).logits
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base_model("lm", gating=gating), tmp_path).double().eval()
    assert_same(loaded(**batch("lm")).logits, expected)
    assert_same(loaded.merge_and_unload()(**batch("lm")).logits, expected)


def test_what_is_saved_is_loaded_again(tmp_path):
    base = tmp_path / "base"
    tiny_lm(torch.float32, std=0.4).save_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base)
    model = adapted(model.eval(), {"target_parameters": EXPERTS, "target_modules": ["lm_head"]}).float()
    expected = model(**batch("lm")).logits
    model.save_pretrained(tmp_path / "adapter")
    files = {path.name for path in (tmp_path / "adapter").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors"} <= files
    assert (tmp_path / "adapter" / "adapter_model.safetensors").stat().st_size < 20_000
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert torch.equal(loaded(**batch("lm")).logits, expected)
    by_transformers = AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert torch.equal(by_transformers(**batch("lm")).logits, expected)

    model.merge_and_unload().save_pretrained(tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert_same(merged(**batch("lm")).logits, expected, rtol=1e-5, atol=1e-5)


def test_generation_uses_the_adapters():
    model = adapted(base_model("lm"), {"target_parameters": EXPERTS, "target_modules": ["lm_head"]}, lora_alpha=9)
    inputs = {name: value for name, value in batch("lm").items() if name != "labels"}
    options = {"max_new_tokens": 5, "eos_token_id": None, "num_beams": 2}
    tokens = model.generate(**inputs, **options)
    with model.disable_adapter():
        assert not torch.equal(tokens, model.generate(**inputs, **options))
    assert torch.equal(tokens, model.merge_and_unload().generate(**inputs, **options))


def test_a_softmax_whose_loss_is_computed_inside_refuses_an_adapter_around_it():
    model = adapted(base_model("lm", loss_chunk_size=3), {"target_modules": ["lm_head"]})
    with pytest.raises(ValueError, match=r"target_parameters=\['lm_head.weight'\]"):
        model(**batch("lm"))


def test_the_trainer_trains_adapters_alone_and_watches_the_balance(tmp_path):
    config = {"importance_loss_coef": 0.3, "load_loss_coef": 0.2, "gating": "noisy_top_k", "dropout": 0.0}
    model = noiseless_lm(torch.float32, **config)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    wrapped = get_peft_model(model, LoraConfig(r=2, target_parameters=[*EXPERTS, "gate.weight"], target_modules=[]))
    windows = StreamWindows(ArrayStream(2 * 5 * 4 + 1), 5, 2)
    callback = AuxLossCallback(load_loss_coef_schedule={0: 0.2, 4: 0.6})
    trainer = tiny_trainer(
        wrapped, windows, tmp_path, max_steps=4, logging_steps=2, per_device_train_batch_size=2, carry_state=True
    )
    callback.attach_to(trainer)
    trainer.train()
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert len(logs) == 2
    assert all(f"layers.1/{name}" in log for log in logs for name in STATISTICS)
    assert model.config.load_loss_coef == pytest.approx(0.5)
    trainer.save_model()
    assert (tmp_path / "adapter_model.safetensors").exists() and not (tmp_path / "model.safetensors").exists()
    changed = {name for name, param in trained_parameters(wrapped).items() if param.abs().max() > 0}
    assert changed == set(trained_parameters(wrapped))
    after = wrapped.unload().state_dict()
    assert all(torch.equal(after[name], weight) for name, weight in before.items())


def test_loads_are_counted_under_the_layers_own_names():
    model = adapted(base_model("gnmt"), {"target_parameters": EXPERTS})
    with routing_totals(model) as totals:
        model(**batch("gnmt"))
    assert set(totals) == {"encoder.layers.2", "decoder.layers.1"}
    assert isinstance(model.get_base_model(), moe_hf.GnmtMoeForConditionalGeneration)


def test_a_translator_with_adapters_trains_by_its_own_loss(tmp_path):
    """Balancing losses included; a Transformer of the library would be trained by the trainer's."""
    model = adapted(base_model("gnmt", importance_loss_coef=5.0).train(), GNMT["experts"][1])
    args = TranslationTrainingArguments(str(tmp_path), use_cpu=True, report_to="none", remove_unused_columns=False)
    trainer = TranslationTrainer(model=model, args=args)
    batch = {"input_ids": torch.randint(3, 9, (2, 5)), "labels": torch.randint(3, 9, (2, 4))}
    torch.manual_seed(3)
    found = trainer.compute_loss(model, dict(batch), num_items_in_batch=8)
    torch.manual_seed(3)
    outputs = model(**batch, num_items_in_batch=8)
    assert outputs.aux_loss > 0.01
    assert_same(found, outputs.loss)


# PEFT finds linear modules only. Weights of MoE and LSTM layers are not linear modules, so they have to be named.
@pytest.mark.parametrize("family", ["lm", "gnmt"])
@pytest.mark.parametrize(
    ("options", "message"),
    [({}, "specify `target_modules` or `target_parameters`"), ({"target_modules": "all-linear"}, "target_parameters")],
)
def test_adapters_without_targets_are_refused(family, options, message):
    task_type = "CAUSAL_LM" if family == "lm" else "SEQ_2_SEQ_LM"
    with pytest.raises(ValueError, match=message) as error:
        get_peft_model(base_model(family), LoraConfig(task_type=task_type, **options))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("family", ["lm", "gnmt"])
def test_all_linear_adds_nothing_to_the_parameters_that_are_named(family):
    """The softmax is the only linear module, and PEFT leaves that out."""
    model = adapted(base_model(family), {"target_parameters": EXPERTS}, target_modules="all-linear")
    assert all("experts" in name for name in trained_parameters(model))
    assert len(trained_parameters(model)) == len(trained_parameters(adapted(base_model(family), GNMT["experts"][1])))


PROMPTS = {
    "prompt tuning": lambda task: PromptTuningConfig(task_type=task, num_virtual_tokens=2),
    "p-tuning": lambda task: PromptEncoderConfig(task_type=task, num_virtual_tokens=2, encoder_hidden_size=8),
}
FAMILY_AND_PROMPT = pytest.mark.parametrize(
    ("family", "how"), [(family, how) for family in ("lm", "gnmt") for how in PROMPTS]
)


def prompted(family, how, model=None):
    torch.manual_seed(3)
    task = "CAUSAL_LM" if family == "lm" else "SEQ_2_SEQ_LM"
    return get_peft_model(model or base_model(family), PROMPTS[how](task)).double().eval()


def with_prompt(model, inputs) -> dict:
    """The inputs of the base model, by hand: first the virtual embeddings, then the tokens' embeddings."""
    ids = inputs["input_ids"]
    prompt = model.get_prompt(batch_size=len(ids)).to(torch.float64)[:, :2]
    embeddings = model.get_base_model().get_input_embeddings()(ids)
    mask = torch.cat([torch.ones(len(ids), 2, dtype=torch.long), inputs["attention_mask"]], dim=1)
    return {"inputs_embeds": torch.cat([prompt, embeddings], dim=1), "attention_mask": mask}


@FAMILY_AND_PROMPT
def test_virtual_tokens_stand_before_the_real_ones(family, how):
    model, inputs = prompted(family, how), batch(family)
    labels = inputs["labels"]
    if family == "lm":
        labels = torch.cat([torch.full((len(labels), 2), -100), labels], dim=1)
    outputs, base = model(**inputs), model.get_base_model()
    expected = base(**with_prompt(model, inputs), labels=labels)
    assert_same(outputs.loss, expected.loss)
    assert_same(outputs.logits, expected.logits)
    parameters = trained_parameters(model)
    assert all("prompt_encoder" in name for name in parameters)
    gradients = torch.autograd.grad(model.train()(**inputs).loss, list(parameters.values()), allow_unused=True)
    assert any(gradient is not None and gradient.abs().max() > 0 for gradient in gradients)


@FAMILY_AND_PROMPT
@torch.no_grad()
def test_generation_reads_the_virtual_tokens_once(family, how):
    model, inputs = prompted(family, how), {name: value for name, value in batch(family).items() if name != "labels"}
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    tokens, base = model.generate(**inputs, **options), model.get_base_model()
    given = with_prompt(model, inputs)
    if family == "gnmt":
        assert torch.equal(tokens, base.generate(**given, **options))
        return
    for expected in tokens[:, inputs["input_ids"].shape[1] :].T:  # reads the whole prefix again for each token
        assert torch.equal(base(**given).logits[:, -1].argmax(-1), expected)
        embeddings = base.get_input_embeddings()(expected[:, None])
        given["inputs_embeds"] = torch.cat([given["inputs_embeds"], embeddings], dim=1)
        given["attention_mask"] = torch.nn.functional.pad(given["attention_mask"], (0, 1), value=1)


@FAMILY_AND_PROMPT
def test_a_prompt_is_saved_and_loaded_again(family, how, tmp_path):
    model, inputs = prompted(family, how).float(), batch(family)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").stat().st_size < 5_000
    loaded = PeftModel.from_pretrained(base_model(family).float(), tmp_path).eval()
    assert_same(loaded(**inputs).logits, model(**inputs).logits, rtol=1e-5, atol=1e-5)
    with loaded.disable_adapter():
        assert not torch.allclose(loaded(**inputs).loss, model(**inputs).loss)


@pytest.mark.parametrize("family", ["lm", "gnmt"])
def test_prefix_tuning_is_refused(family):
    """Prefix tuning writes keys and values of an attention over the past; an LSTM's state does not have them."""
    task = "CAUSAL_LM" if family == "lm" else "SEQ_2_SEQ_LM"
    model = get_peft_model(base_model(family), PrefixTuningConfig(task_type=task, num_virtual_tokens=2))
    with pytest.raises(ValueError, match="cannot hold .* LSTM state"):
        model(**batch(family))


def test_a_classifier_has_adapters_and_a_head(tmp_path):
    config = tiny_lm_config(gating="softmax_top_k", num_labels=3)
    randomize(moe_hf.LstmMoeForSequenceClassification(config)).save_pretrained(tmp_path / "base")
    base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")
    torch.manual_seed(1)
    lora = LoraConfig(task_type="SEQ_CLS", r=2, init_lora_weights=False, target_parameters=EXPERTS, target_modules=[])
    model = get_peft_model(base, lora).eval()
    names = set(trained_parameters(model))
    assert any("score.modules_to_save" in name for name in names) and any("experts" in name for name in names)
    with torch.no_grad():
        model.base_model.model.score.modules_to_save["default"].weight.mul_(1.5)
    ids, labels = random_ids(3, 7), torch.tensor([2, 0, 1])
    expected = model(input_ids=ids, labels=labels)
    model.save_pretrained(tmp_path / "adapter")
    loaded = AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "adapter", num_labels=3).eval()
    assert_same(loaded(input_ids=ids, labels=labels).loss, expected.loss, rtol=1e-5, atol=1e-6)
    merged = loaded.merge_and_unload()
    assert type(merged) is moe_hf.LstmMoeForSequenceClassification
    assert_same(merged(ids, labels=labels).logits, expected.logits, rtol=1e-5, atol=1e-5)
