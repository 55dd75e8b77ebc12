"""Casts: the weights of a pass in one launch, the same values as one by one."""

import copy

import pytest
import torch
from torch import nn

from ofb_kernels import masked_linear, masked_mlp, masked_qkv_attention
from ofb_kernels.casts import Casts, cast_at_once
from ofb_kernels.kernels.fold import fold


@pytest.fixture
def weights(device):
    torch.manual_seed(0)
    shapes = dict(fc1=(24, 16), fc1_bias=(24,), fc2=(16, 24), fc2_bias=(16,), qkv=(3 * 2 * 8, 16), qkv_bias=(48,))
    return {name: nn.Parameter(0.2 * torch.randn(shape, device=device)) for name, shape in shapes.items()}


def network(w, x):
    """Every op whose weights are cast, one of them under a mask."""
    mask, heads = torch.linspace(0.1, 1, 24, device=x.device), torch.ones(2, 8, device=x.device)
    with torch.autocast(x.device.type, torch.float16):
        x = masked_linear(x, w["fc1"], w["fc1_bias"], None, backend="triton")
        x = masked_linear(x, w["fc2"], w["fc2_bias"], None, backend="triton")
        x = masked_qkv_attention(x, w["qkv"], w["qkv_bias"], heads, 0.3, backend="triton")
        return masked_mlp(x, w["fc1"], w["fc1_bias"], mask, w["fc2"], w["fc2_bias"], backend="triton").float()


def results(w, x):
    out = network(w, x)
    return [out.detach(), *torch.autograd.grad(out.square().sum(), list(w.values()))]


def test_the_same_bits_as_casting_one_by_one(weights, device):
    x, casts = torch.randn(2, 40, 16, device=device), Casts()
    plain = results(weights, x)
    for _ in range(3):
        with casts:
            found = results(weights, x)
        assert all(torch.equal(a, b) for a, b in zip(found, plain, strict=True))


def test_the_second_pass_makes_all_copies_at_once(weights, monkeypatch):
    made, foreach = [], torch._foreach_copy_
    monkeypatch.setattr(torch, "_foreach_copy_", lambda copies, of: (made.append(len(copies)), foreach(copies, of)))
    casts, pair = Casts(), (weights["fc1"], weights["fc1_bias"])
    for _ in range(3):
        with casts:
            copies = [cast_at_once(each, torch.float16) for each in pair]
            again = fold(*pair, None, torch.float16)
    assert made == [2, 2]  # none in the first pass, one for both weights in each of the others
    assert all(a is b for a, b in zip(copies, again, strict=True))
    with casts:
        cast_at_once(weights["fc2"], torch.float16)  # new
    with casts:
        assert cast_at_once(weights["fc2"], torch.float16).dtype == torch.float16
    assert made == [2, 2, 2, 1]  # who was not asked for in the pass before is not copied


def test_copies_follow_the_weights_from_pass_to_pass(weights):
    casts, weight = Casts(), weights["fc1"]
    for value in (1.0, 2.0, 3.0):
        with torch.no_grad():
            weight.fill_(value)
        with casts:
            assert fold(weight, None, None, torch.float16)[0].eq(value).all()
    with torch.no_grad():
        weight.data = weight.data[:8].clone()  # as pruning does
    with casts:
        assert fold(weight, None, None, torch.float16)[0].shape == (8, 16)


def test_another_dtype_and_a_weight_of_that_dtype(weights):
    casts, weight = Casts(), weights["fc1"]
    for dtype in (torch.float16, torch.float16, torch.float64):
        with casts:
            assert fold(weight, None, None, dtype)[0].dtype == dtype
            assert cast_at_once(weight, torch.float32) is weight
    assert cast_at_once(weight, torch.float16) is weight  # nobody makes copies outside
    assert cast_at_once(None, torch.float16) is None


def test_a_copy_of_casts_belongs_to_the_copied_weights(weights):
    casts = Casts()
    with casts:
        cast_at_once(weights["fc1"], torch.float16)
    copied = copy.deepcopy((weights["fc1"], casts))
    with torch.no_grad():
        copied[0].fill_(5.0)
    with copied[1]:
        assert cast_at_once(copied[0], torch.float16).eq(5.0).all()


def test_what_is_made_of_parameters_in_every_pass_is_left_alone(weights):
    casts = Casts()
    for _ in range(2):
        with casts:
            joined = torch.cat([weights["fc1"], weights["fc1"]])
            assert cast_at_once(joined, torch.float16) is joined
    copy.deepcopy(casts)  # it would fail on a tensor with a history


def test_after_an_error_nothing_is_active(weights):
    casts = Casts()
    with casts:
        cast_at_once(weights["fc1"], torch.float16)
    with pytest.raises(RuntimeError, match="stop"), casts:
        assert cast_at_once(weights["fc1"], torch.float16).dtype == torch.float16
        raise RuntimeError("stop")
    assert cast_at_once(weights["fc1"], torch.float16) is weights["fc1"]
