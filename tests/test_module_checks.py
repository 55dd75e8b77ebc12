"""What a supernet would pass over or could not prune is refused by name, by `supports` as by `Supernet`."""

import types

import pytest
import torch
from torch import nn

import ofb
from ofb.supernet.families import count_macs
from tests.common import tiny_swin, tiny_vit


class LoRALinear(nn.Linear):
    """A linear layer that adds a product of low rank, as adapters do."""

    def __init__(self, layer: nn.Linear, rank: int = 2) -> None:
        super().__init__(layer.in_features, layer.out_features, layer.bias is not None)
        self.load_state_dict(layer.state_dict())
        self.a = nn.Parameter(torch.randn(rank, layer.in_features))
        self.b = nn.Parameter(torch.randn(layer.out_features, rank))

    def forward(self, x):
        return super().forward(x) + x @ self.a.T @ self.b.T


class PlainLinear(nn.Linear):
    """With a name of its own and nothing else."""


def adapt(model):
    model.blocks[1].attn.qkv = LoRALinear(model.blocks[1].attn.qkv)


def adapt_swin(model):
    block = model.layers[1].blocks[0]
    block.mlp.fc1 = LoRALinear(block.mlp.fc1)


def patch(model):
    mlp = model.blocks[0].mlp
    mlp.forward = types.MethodType(lambda self, x: 2 * type(self).forward(self, x), mlp)


def patch_with_torch(model):
    model.blocks[0].mlp.forward = nn.Identity().forward


def scale(module, args, output):
    return 2 * output


def tie(model):
    model.blocks[1].mlp.fc2.weight = model.blocks[0].mlp.fc2.weight


def repeat(model):
    model.blocks[1] = model.blocks[0]


def parametrize(model):
    nn.utils.parametrizations.weight_norm(model.blocks[0].mlp.fc1)


def parametrize_spectrally(model):
    nn.utils.parametrizations.spectral_norm(model.blocks[1].attn.proj)


def normalize_by_hook(model):
    nn.utils.spectral_norm(model.blocks[0].mlp.fc2)


def deepen_head(model):
    model.head = nn.Sequential(nn.Linear(32, 8), nn.ReLU(), nn.Linear(8, 5))


def adapt_head(model):
    model.head = LoRALinear(model.head)


def widen_head(model):
    model.head = nn.Linear(32, 7)


def drop_head(model):
    model.head = nn.Identity()


def hook(model):
    model.blocks[0].attn.register_forward_hook(scale)


def hook_before(model):
    model.blocks[0].norm1.register_forward_pre_hook(lambda module, args: (2 * args[0],))


def hook_on_the_whole(model):
    model.register_forward_hook(scale)


def hook_backward(model):
    model.blocks[0].mlp.register_full_backward_hook(lambda module, grad_in, grad_out: None)


def widen_swin_head(model):
    model.head.fc = nn.Linear(model.head.fc.in_features, 7)


OBSTACLES = {
    "a LoRA layer": (tiny_vit, adapt, r"blocks\.1\.attn\.qkv: the forward of .*LoRALinear would be passed over; merge"),
    "a LoRA layer in a Swin": (tiny_swin, adapt_swin, r"layers\.1\.blocks\.0\.mlp\.fc1: the forward of .*LoRALinear"),
    "a forward on an instance": (tiny_vit, patch, r"blocks\.0\.mlp: the forward of timm\.layers\.mlp\.Mlp would be"),
    "torch's forward on an instance": (tiny_vit, patch_with_torch, r"blocks\.0\.mlp: the forward of timm"),
    "tied weights": (tiny_vit, tie, r"blocks\.0\.mlp\.fc2\.weight and blocks\.1\.mlp\.fc2\.weight are one parameter"),
    "a block used twice": (tiny_vit, repeat, r"blocks\.0\..* and blocks\.1\..* are one parameter.*give each its own"),
    "weight_norm": (tiny_vit, parametrize, r"blocks\.0\.mlp\.fc1: its weights are parametrized; .*_parametrizations"),
    "spectral_norm": (tiny_vit, parametrize_spectrally, r"blocks\.1\.attn\.proj: its weights are parametrized"),
    "spectral_norm by a hook": (tiny_vit, normalize_by_hook, r"blocks\.0\.mlp\.fc2: its hook SpectralNorm would be"),
    "a deep head": (tiny_vit, deepen_head, "head: expected one Linear, or Identity, got Sequential"),
    "an adapted head": (tiny_vit, adapt_head, "head: the forward of .*LoRALinear would be passed over"),
    "other classes": (tiny_vit, widen_head, r"num_classes=5 outputs, got 7; .*model\.reset_classifier\(7\)"),
    "no head": (tiny_vit, drop_head, r"num_classes=5 outputs, got 0; .*model\.reset_classifier\(0\)"),
    "other classes of a Swin": (tiny_swin, widen_swin_head, r"head\.fc: expected num_classes=5 outputs, got 7"),
    "a hook": (tiny_vit, hook, r"blocks\.0\.attn: its hook scale would be passed over; remove it before"),
    "a hook before": (tiny_vit, hook_before, r"blocks\.0\.norm1: its hook <lambda> would be passed over"),
    "a hook on the model": (tiny_vit, hook_on_the_whole, "the model: its hook scale would be passed over"),
    "a backward hook": (tiny_vit, hook_backward, r"blocks\.0\.mlp: its hook <lambda> would be passed over"),
}


@pytest.mark.parametrize("name", OBSTACLES)
def test_is_refused_by_name(name):
    make, change, message = OBSTACLES[name]
    model = make()
    change(model)
    support = ofb.supports(model)
    assert not support
    with pytest.raises(ValueError, match=message) as raised:
        ofb.Supernet(model, epochs=1, steps_per_epoch=2)
    assert str(raised.value) == f"model: cannot be searched: {support.reason.removeprefix('cannot be searched: ')}"
    assert "\n" not in support.reason


def rename(model):
    for owner, name in [*((block.mlp, "fc1") for block in model.blocks), (model, "head")]:
        layer = getattr(owner, name)
        setattr(owner, name, PlainLinear(layer.in_features, layer.out_features))


def untie(model):
    parametrize(model)
    nn.utils.parametrize.remove_parametrizations(model.blocks[0].mlp.fc1, "weight")


def unhook(model):
    model.blocks[0].attn.register_forward_hook(scale).remove()


def relabel(model):
    model.reset_classifier(7)


@pytest.mark.parametrize("change", [rename, untie, unhook, relabel])
def test_what_changes_nothing_is_supported(change):
    """A subclass without a forward of its own, and what was taken back as the errors say."""
    model = tiny_vit()
    change(model)
    assert ofb.supports(model)
    ofb.Supernet(model, epochs=1, steps_per_epoch=2)


def test_hooks_do_not_keep_a_network_from_being_counted():
    """A search passes them over; a found network may be watched."""
    model = tiny_vit()
    expected = count_macs(model)
    hook(model)
    assert count_macs(model) == expected
