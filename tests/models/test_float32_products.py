"""The gates' products stay IEEE float32 in a run with TF32; checks the setting, which does not affect a CPU."""

import pytest
import torch

from moe_hf.models import gating
from moe_hf.models.float32_products import full_float32
from moe_hf.models.gating import SoftmaxTopKGate

PRODUCTS = torch.backends.cuda.matmul


@pytest.fixture
def tf32():
    before = PRODUCTS.fp32_precision
    PRODUCTS.fp32_precision = "tf32"
    yield
    PRODUCTS.fp32_precision = before


def test_a_gpus_products_are_ieee_inside_and_as_before_outside(tf32):
    with pytest.raises(KeyError), full_float32(torch.device("cuda", 0)):
        assert PRODUCTS.fp32_precision == "ieee"
        raise KeyError
    assert PRODUCTS.fp32_precision == "tf32"


def test_other_devices_and_other_settings_are_left_alone(tf32):
    with full_float32(torch.device("cpu")):
        assert PRODUCTS.fp32_precision == "tf32"
    PRODUCTS.fp32_precision = "none"
    with full_float32(torch.device("cuda")):
        assert PRODUCTS.fp32_precision == "none"


def test_a_gate_computes_its_logits_so(tf32, monkeypatch):
    seen, linear = [], torch.nn.functional.linear

    def spy(*args):
        seen.append(PRODUCTS.fp32_precision)
        return linear(*args)

    monkeypatch.setattr(gating, "full_float32", lambda device: full_float32(torch.device("cuda")))
    monkeypatch.setattr(torch.nn.functional, "linear", spy)
    SoftmaxTopKGate(8, 4, 2)(torch.randn(3, 8))
    assert seen == ["ieee"] and PRODUCTS.fp32_precision == "tf32"
