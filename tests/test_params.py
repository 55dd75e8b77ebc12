"""Parameters as a function of the sizes, against the networks themselves."""

import random

import pytest
import timm
import torch

from ofb.supernet import Supernet
from ofb.supernet.families import build, describe, family_of
from ofb.supernet.params import cut_to, params_cost
from tests.common import tiny_swin, tiny_vit


def uneven_swin():
    """A Swin whose blocks have sizes of their own."""
    description = describe(tiny_swin())
    for s, stage in enumerate(description["stages"]):
        stage["embed_dim"] += 6 * s + 3
        for i, block in enumerate(stage["blocks"]):
            block |= {"heads": 2 + 2 * i, "head_dim": 8 - 3 * i, "hidden": 40 + 10 * i}
    return build(description)


NETWORKS = {
    "vit": tiny_vit,
    "distilled": lambda: tiny_vit("deit_tiny_distilled_patch16_224"),
    "pooled by attention": lambda: tiny_vit("vit_base_patch16_siglip_224"),
    "eva": lambda: tiny_vit("eva02_tiny_patch14_224"),
    "swin": tiny_swin,
    "uneven swin": uneven_swin,
}


@pytest.mark.parametrize("name", NETWORKS)
def test_equals_the_number_of_parameters(name):
    model, generator = NETWORKS[name](), random.Random(0)
    cost, submodules = params_cost(model), family_of(model).submodules(model)
    for _ in range(8):
        sizes = {
            submodule: (generator.choice(s.candidates.heads), generator.choice(s.candidates.channels))
            for submodule, s in submodules.items()
        }
        network = cut_to(model, sizes)
        network(torch.randn(1, 3, *model.patch_embed.img_size))
        assert cost.total(sizes) == sum(parameter.numel() for parameter in network.parameters())


@pytest.mark.parametrize(
    ("name", "published"),
    [("deit_tiny_patch16_224", 5.7e6), ("swin_tiny_patch4_window7_224", 28.3e6)],
)
def test_published_figures(name, published):
    model = timm.create_model(name)
    full = {submodule: s.candidates.full for submodule, s in family_of(model).submodules(model).items()}
    assert params_cost(model).total(full) == pytest.approx(published, rel=0.01)


@pytest.mark.parametrize(
    ("name", "target"),
    [
        ("vit", {"params": "50%"}),
        ("swin", {"params": "50%"}),
        ("eva", "params=60%"),
        ("vit", {"macs": "50%", "params": "40%"}),
        ("swin", {"macs": "40%", "params": "50%"}),
    ],
)
def test_extracted_network_keeps_within_its_budgets(name, target):
    supernet = Supernet(NETWORKS[name](), target, epochs=2, steps_per_epoch=2)
    used = []
    network = supernet.extract()
    full = {submodule: s.candidates.full for submodule, s in family_of(network).submodules(network).items()}
    if "params" in supernet.target:
        assert params_cost(network).total(full) == sum(parameter.numel() for parameter in network.parameters())
        used.append(sum(parameter.numel() for parameter in network.parameters()) / supernet.target["params"])
    if "macs" in supernet.target:
        used.append(family_of(network).macs(network).total(full) / supernet.target_macs)
    assert 0.98 <= max(used) <= 1
