"""Masked MLPs: where the mask meets a gated one."""

import pytest
import torch
from timm.layers import GluMlp, Mlp, SwiGLU
from torch import nn

from ofb.supernet.families import mlps


def formula(mlp, x, mask):
    """fc2(act(gate) ⊙ value ⊙ m), and of a plain Mlp fc2(act(fc1(x) ⊙ m))."""
    if type(mlp) is Mlp:
        return mlp.fc2(mlp.act(mlp.fc1(x) * mask))
    if type(mlp) is SwiGLU:
        gate, value = mlp.fc1_g(x), mlp.fc1_x(x)
    else:
        gate, value = mlp.fc1(x).chunk(2, -1)
        if mlp.gate_last:
            gate, value = value, gate
    return mlp.fc2(mlp.act(gate) * value * mask)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Mlp(6, 10),
        lambda: SwiGLU(6, 10),
        lambda: GluMlp(6, 20, act_layer=nn.SiLU, gate_last=False),
        lambda: GluMlp(6, 20, act_layer=nn.SiLU),
    ],
    ids=["Mlp", "SwiGLU", "GluMlp, gate first", "GluMlp, gate last"],
)
def test_the_mask_scales_the_value(make):
    mlp, x, mask = make().double(), torch.randn(2, 3, 6).double(), torch.rand(10).double()
    with torch.no_grad():
        expected = formula(mlp, x, mask)
        out, late_bias = mlps.masked_forward(mlp, x, mask, norm_mask=None)
        assert late_bias is None
        torch.testing.assert_close(out, expected)
        out, late_bias = mlps.masked_forward(mlp, x, mask, norm_mask=None, without_bias=True)
        assert late_bias is mlp.fc2.bias
        torch.testing.assert_close(out + late_bias, expected)
        mlps.fold(mlp, mask)
        torch.testing.assert_close(mlp(x), expected)
