"""torchao's int8 weights on both families: loading, saving, computation and refusals."""

import json

import pytest
import torch
from safetensors import safe_open
from torchao.quantization import (
    FqnToConfig,
    Int4WeightOnlyConfig,
    Int8DynamicActivationInt8WeightConfig,
    Int8WeightOnlyConfig,
    PerGroup,
)
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    BitsAndBytesConfig,
    GPTQConfig,
    QuantoConfig,
    TorchAoConfig,
    Trainer,
    TrainingArguments,
)
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from moe_hf import GnmtMoeConfig, GnmtMoeForConditionalGeneration, LstmMoeConfig, LstmMoeForCausalLM
from moe_hf.hub import with_code
from moe_hf.models.quantization import int8_linear

AUTO = {"lm": AutoModelForCausalLM, "gnmt": AutoModelForSeq2SeqLM}
FAMILIES = list(AUTO)
ADVICE = (
    r"use TorchAoConfig\(Int8WeightOnlyConfig\(\)\), include_input_output_embeddings=True for embedding and softmax"
)


def built(family, **changes):
    """A model of width 32 with random weights, in evaluation."""
    values = dict(vocab_size=50, hidden_size=32, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=40)
    values |= dict(gating="softmax_top_k", dropout=0.0, pad_token_id=0)
    if family == "lm":
        model = LstmMoeForCausalLM(LstmMoeConfig(**(values | dict(eos_token_id=0) | changes)))
    else:
        tokens = dict(bos_token_id=1, decoder_start_token_id=1, eos_token_id=2)
        model = GnmtMoeForConditionalGeneration(GnmtMoeConfig(**(values | tokens | changes)))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator) * (1.0 if "gate" in name else 0.3))
    return model.eval()


def quantized(family, folder, embeddings=False, model_class=None, **options):
    config = TorchAoConfig(Int8WeightOnlyConfig(), include_input_output_embeddings=embeddings)
    return (model_class or AUTO[family]).from_pretrained(folder, quantization_config=config, **options)


def class_of_folder(family, folder):
    """Returns the class from the folder's code; the Auto classes would use the package's registered class."""
    auto_map = json.loads((folder / "config.json").read_text())["auto_map"]
    return get_class_from_dynamic_module(auto_map[AUTO[family].__name__], folder)


def inputs_of(family):
    """Two rows, one of them padded on the left."""
    ids = torch.tensor([[3, 9, 4, 11, 5, 7], [0, 0, 8, 6, 10, 12]])
    inputs = {"input_ids": ids, "attention_mask": (ids != 0).long()}
    return inputs if family == "lm" else inputs | {"decoder_input_ids": torch.tensor([[1, 5, 9, 7], [1, 6, 8, 10]])}


@torch.no_grad()
def logits_of(model, inputs):
    """Returns the logits of real tokens."""
    mask = inputs["attention_mask"] if "decoder_input_ids" not in inputs else torch.ones(2, 4)
    return model(**inputs).logits[mask.bool()]


@torch.no_grad()
def stepwise_logits(model, inputs):
    """Returns the logits of the last three tokens, read one by one after the other tokens."""
    key = "input_ids" if "decoder_input_ids" not in inputs else "decoder_input_ids"
    ids, rest = inputs[key], {name: value for name, value in inputs.items() if name != key}
    logits = []
    outputs = model(**{key: ids[:, :-3]}, **_mask_until(rest, key, ids.shape[1] - 3), use_cache=True)
    for position in range(ids.shape[1] - 3, ids.shape[1]):
        state = outputs.past_key_values
        outputs = model(
            **{key: ids[:, position, None]},
            **_mask_until(rest, key, position + 1),
            past_key_values=state,
            use_cache=True,
        )
        logits.append(outputs.logits)
    return torch.cat(logits, dim=1)


def _mask_until(rest, key, length):
    return {"attention_mask": rest["attention_mask"][:, :length]} if key == "input_ids" else rest


def int8_names(model):
    return {name for name, weight in model.named_parameters() if hasattr(weight, "qdata")}


def expected_names(model, embeddings):
    """Every matrix but the gates', and on request embedding and softmax."""
    matrices = {name for name, weight in model.named_parameters() if weight.dim() > 1 and "gate" not in name}
    return {name for name in matrices if embeddings or not ("embed_tokens" in name or "lm_head" in name)}


def stored_bytes(folder, names):
    """Bytes of these parameters in the file, whatever parts they are stored in, and the names of all tensors."""
    prefixes = tuple(part for name in names for part in (name, "._".join(name.rsplit(".", 1)) + "_"))
    with safe_open(folder / "model.safetensors", "pt") as file:
        keys = list(file.keys())
        return sum(file.get_tensor(key).nbytes for key in keys if key.startswith(prefixes)), keys


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("embeddings", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_loaded_saved_and_loaded_again(family, embeddings, tied, tmp_path):
    source = built(family, tie_word_embeddings=tied, lstm_hidden_size=48)
    source.save_pretrained(tmp_path / "float")
    models = [quantized(family, tmp_path / "float", embeddings)]
    for generation in ("first", "second"):
        models[-1].save_pretrained(tmp_path / generation)
        models.append(AUTO[family].from_pretrained(tmp_path / generation))

    names, inputs = expected_names(source, embeddings), inputs_of(family)
    assert all(int8_names(model) == names for model in models)
    before, _ = stored_bytes(tmp_path / "float", names)
    for folder in (tmp_path / "first", tmp_path / "second"):
        after, keys = stored_bytes(folder, names)
        assert after <= 0.3 * before
        assert any("lm_head" in key for key in keys) is not tied  # a shared matrix is stored once
    logits = [logits_of(model, inputs) for model in models]
    torch.testing.assert_close(logits[0], logits_of(source, inputs), rtol=0, atol=0.5)
    assert all(torch.equal(other, logits[0]) for other in logits[1:])
    assert all((model.lm_head.weight is model.get_input_embeddings().weight) is tied for model in models)
    ids = inputs["input_ids"][:1]
    tokens = [model.generate(ids, max_new_tokens=5, do_sample=False) for model in models]
    assert all(torch.equal(other, tokens[0]) for other in tokens[1:])


VARIATIONS = [
    ("lm", {}),
    ("lm", {"lstm_hidden_size": 48, "tie_word_embeddings": True}),
    ("lm", {"num_expert_layers": 3, "hidden_act": "gelu"}),
    ("lm", {"gating": "noisy_top_k", "num_experts": 8, "num_experts_per_tok": 4, "num_expert_groups": 4}),
    ("lm", {"gating": "strictly_balanced"}),
    ("lm", {"loss_chunk_size": 2}),
    ("gnmt", {}),
    ("gnmt", {"attention_feeding": "input", "lstm_hidden_size": 48}),
    ("gnmt", {"attention_feeding": "parallel", "attention_type": "additive"}),
    ("gnmt", {"share_embeddings": False, "tie_word_embeddings": True}),
]


@pytest.mark.parametrize("family, changes", VARIATIONS)
def test_outputs_are_those_of_the_dequantized_weights(family, changes, tmp_path):
    source = built(family, **changes)
    source.save_pretrained(tmp_path)
    model = quantized(family, tmp_path, embeddings=True)

    reference = built(family, **changes).double()
    weights, tensors = dict(model.named_parameters()), dict(source.named_parameters())
    with torch.no_grad():
        for name, weight in reference.named_parameters():
            if name in int8_names(model):
                parts, tensor = weights[name], tensors[name].double()
                weight.copy_(parts.qdata.double() * parts.scale.double())
                step = tensor.abs().amax(dim=-1, keepdim=True) / 127.5  # one of 255 in every row
                assert ((weight - tensor).abs() <= 0.5001 * step).all(), name

    inputs = inputs_of(family)
    torch.testing.assert_close(logits_of(model, inputs).double(), logits_of(reference, inputs), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        stepwise_logits(model, inputs).double(), stepwise_logits(reference, inputs), rtol=1e-4, atol=1e-4
    )
    labels = inputs.get("decoder_input_ids", inputs["input_ids"])
    losses = [part(**inputs, labels=labels).loss.item() for part in (model, reference)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_packed_documents(tmp_path):
    built("lm").save_pretrained(tmp_path)
    model = quantized("lm", tmp_path)
    documents = [torch.tensor([[3, 9, 4, 11, 5]]), torch.tensor([[8, 6, 10]])]
    positions = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2]])
    with torch.no_grad():
        packed = model(input_ids=torch.cat(documents, dim=1), position_ids=positions).logits
        alone = torch.cat([model(input_ids=document).logits for document in documents], dim=1)
    torch.testing.assert_close(packed, alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("width", [512, 200, 520])
@pytest.mark.parametrize("outputs, rows", [(1024, 1), (1024, 16), (1024, 17), (1003, 64), (33278, 1), (33278, 40)])
def test_product_with_a_large_matrix(width, outputs, rows):
    """Few rows are rounded to bfloat16, whose 8 bits have an error up to 2**-9; so has the result.

    torch's kernel for few rows reads beyond the end of a matrix of unsupported width, and ends the process.

    A gradient sums over the outputs. On some processors, torch's own float32 product of one row sums 33,278 of them
    one after the other, with an error of 3e-6. The gradient must be as exact as 1e-6 or as that product.
    """
    generator = torch.Generator().manual_seed(0)
    precision = 4e-3 if rows <= 16 and width == 512 else 1e-6
    x, bias = torch.randn(rows, width, generator=generator), torch.randn(outputs, generator=generator)
    qdata = torch.randint(-128, 128, (outputs, width), generator=generator, dtype=torch.int8)
    scale = torch.rand(outputs, 1, generator=generator)
    weight = qdata.double() * scale.double()
    expected = x.double() @ weight.T + bias.double()
    actual = int8_linear(x, qdata, scale, bias).double()
    assert (actual - expected).norm() <= precision * expected.norm()

    x.requires_grad_()
    y = int8_linear(x, qdata, scale, bias)
    grad = torch.randn(y.shape, generator=generator)
    assert (y.double() - expected).norm() <= 1e-6 * expected.norm()
    expected = grad.double() @ weight
    (gradient,) = torch.autograd.grad(y, x, grad)
    error, of_float = ((product.double() - expected).norm() for product in (gradient, grad @ weight.float()))
    assert error <= max(1e-6 * expected.norm(), of_float)


OTHERS = {
    "int4": TorchAoConfig(Int4WeightOnlyConfig()),
    "int8 activations": TorchAoConfig(Int8DynamicActivationInt8WeightConfig()),
    "int8 by group": TorchAoConfig(Int8WeightOnlyConfig(granularity=PerGroup(16))),
    "gates": TorchAoConfig(FqnToConfig({r"re:.*gate\.weight": Int8WeightOnlyConfig()})),
    "nothing": TorchAoConfig(FqnToConfig({})),
    "quanto": QuantoConfig(weights="int8"),
    "bitsandbytes, 8 bits": BitsAndBytesConfig(load_in_8bit=True),
    "bitsandbytes, 4 bits": BitsAndBytesConfig(load_in_4bit=True),
    "GPTQ": GPTQConfig(bits=4),
    "a dictionary": {"quant_method": "bitsandbytes", "load_in_8bit": True},
}


@pytest.fixture(scope="module")
def without_weights(tmp_path_factory):
    """Returns {(family, kind): a folder without weights}; "exported" folders contain the model code."""
    folders = {}
    for family in FAMILIES:
        for kind in ("saved", "exported"):
            folder = folders[family, kind] = tmp_path_factory.mktemp(f"{family}-{kind}")
            model = built(family)
            if kind == "exported":
                with_code(model)
            model.save_pretrained(folder)
            type(model)._auto_class = type(model.config)._auto_class = None  # which the library keeps in the class
            (folder / "model.safetensors").unlink()
    return folders


@pytest.mark.parametrize("kind", ["saved", "exported"])
@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("family", FAMILIES)
def test_any_other_quantization_is_refused_before_weights_are_read(family, name, kind, without_weights):
    folder = without_weights[family, kind]
    model_class = AUTO[family] if kind == "saved" else class_of_folder(family, folder)
    with pytest.raises(ValueError, match=ADVICE) as error:
        model_class.from_pretrained(folder, quantization_config=OTHERS[name])
    assert str(error.value).startswith("quantization_config=") and "\n" not in str(error.value)


@pytest.mark.parametrize("through_auto", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_folder_that_says_another_quantization_is_refused(family, through_auto, tmp_path):
    model = built(family)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = TorchAoConfig(Int8WeightOnlyConfig()).to_dict() | {"quant_method": "quanto"}
    if not through_auto:  # its libraries are not asked for first
        config["quantization_config"] = TorchAoConfig(Int4WeightOnlyConfig()).to_dict()
    (tmp_path / "config.json").write_text(json.dumps(config, default=str))
    with pytest.raises(ValueError, match=ADVICE):
        (AUTO[family] if through_auto else type(model)).from_pretrained(tmp_path)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_folder_with_its_code(family, tmp_path):
    source = built(family)
    with_code(source).save_pretrained(tmp_path / "float")
    type(source)._auto_class = type(source.config)._auto_class = None
    first = quantized(family, tmp_path / "float", model_class=class_of_folder(family, tmp_path / "float"))
    with_code(first).save_pretrained(tmp_path / "int8")
    second = class_of_folder(family, tmp_path / "int8").from_pretrained(tmp_path / "int8")
    assert type(second).__module__.startswith("transformers_modules")
    assert int8_names(second) == expected_names(source, embeddings=False)
    inputs = inputs_of(family)
    assert torch.equal(logits_of(second, inputs), logits_of(quantized(family, tmp_path / "float"), inputs))


@pytest.mark.parametrize("family", FAMILIES)
def test_implementations_of_the_experts(family, tmp_path):
    built(family).save_pretrained(tmp_path)
    inputs = inputs_of(family)
    logits = [
        logits_of(quantized(family, tmp_path, experts_implementation=name), inputs) for name in ("eager", "moe_hf")
    ]
    assert torch.equal(*logits)
    with pytest.raises(ValueError, match="experts_implementation='batched_mm' computes with float weights"):
        quantized(family, tmp_path).set_experts_implementation("batched_mm")
    with pytest.raises(ValueError, match="experts_implementation='batched_mm' computes with float weights"):
        quantized(family, tmp_path, experts_implementation="batched_mm")


@pytest.mark.parametrize("family", FAMILIES)
def test_training_is_refused(family, tmp_path):
    built(family).save_pretrained(tmp_path)
    arguments = TrainingArguments(str(tmp_path / "run"), use_cpu=True, report_to="none")
    with pytest.raises(ValueError, match="cannot perform fine-tuning on purely quantized models"):
        Trainer(quantized(family, tmp_path), arguments)


@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated")
@pytest.mark.parametrize("family", FAMILIES)
def test_dynamic_quantization_by_torch_changes_nothing(family):
    model = built(family)
    other = torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear, torch.nn.LSTM}, dtype=torch.qint8)
    assert all(weight.dtype == torch.float32 for weight in other.state_dict().values())
    assert torch.equal(logits_of(other, inputs_of(family)), logits_of(model, inputs_of(family)))
