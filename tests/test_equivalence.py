"""A supernet whose masks are all one computes what its network does, or says which module does not."""

import pytest
import timm
import torch
from timm.layers import Mlp
from timm.layers.attention import Attention
from timm.models.eva import EvaAttention
from timm.models.swin_transformer import SwinTransformerBlock
from timm.models.vision_transformer import Block
from torch import nn
from torch.nn.modules.module import register_module_forward_hook

import ofb
from tests.common import tiny_swin, tiny_vit


def tiny_eva() -> nn.Module:
    return tiny_vit("vit_small_patch16_dinov3", num_classes=5)


MAKERS = {"vit": tiny_vit, "swin": tiny_swin, "eva": tiny_eva}
# Which module computes something else, where no look at the model can tell: what the error names.
CHANGED = {
    "MLP": ("vit", Mlp, 0, "blocks.0.mlp"),
    "a later MLP": ("vit", Mlp, 1, "blocks.1.mlp"),
    "attention": ("vit", Attention, 1, "blocks.1.attn"),
    "block": ("vit", Block, 0, "blocks.0"),
    "norm": ("vit", nn.LayerNorm, 0, "blocks.0.norm1"),
    "linear layer": ("vit", nn.Linear, 1, "blocks.0.attn.proj"),
    "head": ("vit", nn.Linear, 8, "head"),
    "patch embedding": ("vit", timm.layers.PatchEmbed, 0, "none of its blocks"),
    "MLP of a Swin": ("swin", Mlp, 2, "layers.1.blocks.0.mlp"),
    "block of a Swin": ("swin", SwinTransformerBlock, 0, "layers.0.blocks.0"),
    "rotary attention": ("eva", EvaAttention, 1, "blocks.1.attn"),
}


@pytest.fixture
def changed(request):
    """The n-th module of a kind gives 1.5 times what it should, for as long as a test lasts: to no one's sight."""
    hooks = []

    def change(model: nn.Module, kind: type[nn.Module], number: int) -> None:
        module = [each for each in model.modules() if isinstance(each, kind)][number]
        hooks.append(register_module_forward_hook(lambda each, _, output: 1.5 * output if each is module else None))

    yield change
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize("name", CHANGED)
def test_the_first_module_to_differ_is_named(name, changed):
    family, kind, number, expected = CHANGED[name]
    model = MAKERS[family]()
    with torch.no_grad():
        for parameter in model.parameters():  # also where timm starts at 0
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    changed(model, kind, number)
    assert ofb.supports(model)
    message = f"model: cannot be searched: .* the first module to differ is {expected}; verify=False"
    with pytest.raises(ValueError, match=message):
        ofb.Supernet(model, criterion=lambda *_: None, epochs=1, steps_per_epoch=2)
    ofb.Supernet(model, criterion=lambda *_: None, epochs=1, steps_per_epoch=2, verify=False)


@pytest.mark.parametrize("residual_mask", ["stream", "input"])
@pytest.mark.parametrize("family", MAKERS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_leaves_no_trace(family, dtype, residual_mask):
    """Modes, weights, gradients and the random numbers to come are what they were."""
    model = MAKERS[family]().to(dtype)
    model.norm.eval()
    modes = [module.training for module in model.modules()]
    weights = {name: weight.clone() for name, weight in model.named_parameters()}
    torch.manual_seed(0)
    ofb.Supernet(model, residual_mask=residual_mask, epochs=1, steps_per_epoch=2)
    drawn = torch.rand(3)
    torch.manual_seed(0)
    ofb.Supernet(model, residual_mask=residual_mask, epochs=1, steps_per_epoch=2, verify=False)
    assert torch.equal(torch.rand(3), drawn)
    assert [module.training for module in model.modules()] == modes
    assert all(weight.grad is None and torch.equal(weight, weights[name]) for name, weight in model.named_parameters())
    assert not any(module._forward_hooks for module in model.modules())


def test_a_search_of_tokens_and_one_with_masked_images():
    ofb.Supernet(tiny_vit(), space=ofb.SearchSpace(tokens=True), mask_ratio_end=0.25, epochs=1, steps_per_epoch=2)


def test_weights_that_are_not_finite():
    model = tiny_vit()
    model.blocks[1].mlp.fc1.weight.data[3, 4] = torch.nan
    with pytest.raises(ValueError, match="model: expected a finite output for a random batch, got NaN or infinity"):
        ofb.Supernet(model, epochs=1, steps_per_epoch=2)
