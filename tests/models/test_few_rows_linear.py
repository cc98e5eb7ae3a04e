"""The two weight layouts for multiplying a few rows by a large weight."""

import pytest
import torch
from tiny_models import tiny_gnmt, tiny_lm

from moe_hf.models import few_rows_linear as module
from moe_hf.models.few_rows_linear import few_rows_linear
from moe_hf.models.softmax_loss import SoftmaxHead

WIDTH = 6


@pytest.fixture
def transposed(monkeypatch):
    """The shapes that are multiplied as (W x')'; the faked measurement prefers this layout up to 4 rows."""
    shapes = []
    product = module._transposed_product
    monkeypatch.setattr(module, "_transposed_product", lambda x, weight: shapes.append(x.shape) or product(x, weight))
    monkeypatch.setattr(module, "MIN_WEIGHT_SIZE", 4 * WIDTH)
    monkeypatch.setattr(module, "_limits", {})
    monkeypatch.setattr(module, "kept_choice", lambda name, measure, unmeasured: 4)
    return shapes


def draw(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize(
    ("shape", "is_transposed"),
    [((1, 1), False), ((2, 1), True), ((4,), True), ((2, 2, 1), True), ((5,), False), ((9,), False), ((0,), False)],
)
def test_up_to_the_limit_rows_are_transposed_with_the_same_result(shape, is_transposed, transposed):
    x, weight = draw(*shape, WIDTH), draw(11, WIDTH, seed=1)
    output = few_rows_linear(x, weight)
    assert bool(transposed) == is_transposed
    assert output.is_contiguous()
    torch.testing.assert_close(output.double(), x.double() @ weight.double().T, rtol=1e-6, atol=1e-6)


def test_the_plain_product_stays_for_all_else(transposed):
    x, weight = draw(2, WIDTH), draw(11, WIDTH, seed=1)
    wide = draw(11, 2 * WIDTH, seed=1)
    for rows, matrix in [
        (x, draw(3, WIDTH)),
        (x.double(), weight.double()),
        (x.bfloat16(), weight.bfloat16()),
        (x, wide[:, :WIDTH]),
        (x, weight.clone().requires_grad_()),
        (x.clone().requires_grad_(), weight),
    ]:
        assert torch.equal(few_rows_linear(rows, matrix), torch.nn.functional.linear(rows, matrix))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert few_rows_linear(x, weight).dtype == torch.bfloat16
    assert not transposed
    with torch.no_grad():
        few_rows_linear(x, weight.clone().requires_grad_())
    assert transposed == [(2, WIDTH)]


def test_an_exported_head_serves_any_number_of_rows(transposed):
    head = SoftmaxHead(WIDTH, 11)
    with torch.no_grad():
        rows = torch.export.Dim("rows", min=1, max=64)
        exported = torch.export.export(head, (draw(3, WIDTH),), dynamic_shapes=({0: rows},)).module()
        assert not transposed
        for num in (2, 9):
            x = draw(num, WIDTH)
            torch.testing.assert_close(exported(x), torch.nn.functional.linear(x, head.weight))


def test_the_measurement_chooses_among_the_rows_tried(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(module, "_limits", {})
    monkeypatch.setattr(module, "_MEASURED_SIZE", 8 * WIDTH)
    before = torch.get_rng_state()
    limit = module._rows_transposed(draw(11, WIDTH))
    assert limit in (0, *module.ROWS_TRIED)
    assert torch.equal(torch.get_rng_state(), before)
    (file,) = (tmp_path / "moe_hf").iterdir()
    assert file.name.startswith(f"few_rows_linear-8-{WIDTH}-1threads") and file.read_text() == str(limit)


@pytest.mark.parametrize("tie_word_embeddings", [True, False])
@pytest.mark.parametrize("make_model", [tiny_lm, tiny_gnmt], ids=["lm", "gnmt"])
def test_logits_of_both_families_are_those_of_the_plain_product(make_model, tie_word_embeddings, transposed):
    model = make_model(torch.float32, tie_word_embeddings=tie_word_embeddings).eval()
    inputs = {"input_ids": torch.tensor([[5, 6], [7, 8]])}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = torch.tensor([[1, 4], [1, 9]])
    expected = model(**inputs).logits
    assert not transposed
    with torch.no_grad():
        logits = model(**inputs).logits
    assert transposed == [(4, model.config.hidden_size)]
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-6)
