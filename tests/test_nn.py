"""nn: modules take timm's weights, compute the ops, train, compile, and run under autocast."""

import pytest
import torch
from timm.layers import Mlp
from timm.models.vision_transformer import Attention
from torch import nn

from ofb_kernels import use_backend
from ofb_kernels.nn import MaskedAttention, MaskedLayerNorm, MaskedLinear, MaskedMlp
from tests.common import BACKENDS

# The masked module, the dense one whose weights it takes, and the shape of its mask.
PAIRS = {
    "linear": (lambda: MaskedLinear(24, 40), lambda: nn.Linear(24, 40), (40,)),
    "mlp": (lambda: MaskedMlp(24, 40), lambda: Mlp(24, 40), (40,)),
    "attention": (
        lambda: MaskedAttention(24, num_heads=3, qkv_bias=True),
        lambda: Attention(24, num_heads=3, qkv_bias=True),
        (3, 8),
    ),
    "layer_norm": (lambda: MaskedLayerNorm(24), lambda: nn.LayerNorm(24, eps=1e-6), (24,)),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", PAIRS)
def test_a_mask_of_ones_is_the_dense_module(name, backend, device):
    make_masked, make_dense, mask_shape = PAIRS[name]
    masked, dense = make_masked().to(device), make_dense().to(device)
    masked.load_state_dict(dense.state_dict(), strict=True)
    x = torch.randn(2, 7, 24, device=device)
    with use_backend(backend):
        out = masked(x, torch.ones(mask_shape, device=device))
    torch.testing.assert_close(out, dense(x))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", PAIRS)
def test_trains_and_compiles_to_one_graph(name, backend, device):
    masked = PAIRS[name][0]().to(device)
    mask = torch.rand(PAIRS[name][2], device=device).requires_grad_()
    x = torch.randn(2, 7, 24, device=device)
    with use_backend(backend):
        expected = masked(x, mask)
        out = torch.compile(masked, fullgraph=True, backend="aot_eager")(x, mask)
    torch.testing.assert_close(out, expected)
    leaves = [*masked.parameters(), mask]
    for got, want in zip(
        torch.autograd.grad(out.square().sum(), leaves),
        torch.autograd.grad(expected.square().sum(), leaves),
        strict=True,
    ):
        assert want.abs().max() > 0
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("name", PAIRS)
def test_autocast(name, device):
    masked, mask = PAIRS[name][0]().to(device), torch.rand(PAIRS[name][2], device=device)
    with torch.autocast(device, dtype=torch.bfloat16):
        out = masked(torch.randn(2, 7, 24, device=device), mask)
    assert out.dtype == torch.bfloat16


@pytest.mark.parametrize("name", PAIRS)
def test_device_and_dtype(name):
    make = {
        "linear": lambda **options: MaskedLinear(8, 4, **options),
        "mlp": lambda **options: MaskedMlp(8, **options),
        "attention": lambda **options: MaskedAttention(8, num_heads=2, **options),
        "layer_norm": lambda **options: MaskedLayerNorm(8, **options),
    }[name]
    parameters = list(make(device="meta", dtype=torch.float64).parameters())
    assert all(parameter.is_meta and parameter.dtype == torch.float64 for parameter in parameters)


def test_pruned_attention_keeps_its_scale(device):
    """Heads narrower than dim / num_heads, as a search leaves them, with the scale of the network they came from."""
    attention = MaskedAttention(24, num_heads=2, head_dim=5, scale=24**-0.5).to(device)
    out = attention(torch.randn(2, 7, 24, device=device), torch.ones(2, 5, device=device))
    assert out.shape == (2, 7, 24)
    assert attention.qkv.weight.shape == (30, 24)
    assert attention.proj.weight.shape == (24, 10)


def test_attention_of_an_odd_width_is_refused():
    with pytest.raises(ValueError, match="expected dim as a multiple of num_heads=5, got 24"):
        MaskedAttention(24, num_heads=5)
