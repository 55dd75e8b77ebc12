"""The ViT family: what it refuses, what it couples, and how it describes a model."""

import json

import pytest
import timm
import torch
from torch import nn

from ofb.supernet.families import build, count_macs, describe, family_of, vit
from tests.common import tiny_vit


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"class_token": False, "global_pool": "avg"}, "expected a class token and global_pool='token'"),
        ({"reg_tokens": 2}, "register tokens"),
        ({"qk_norm": True}, "qk_norm"),
        ({"pos_embed": "none"}, "absolute position embedding"),
        ({"dynamic_img_size": True}, "dynamic_img_size"),
        ({"attn_drop_rate": 0.1}, "attention dropout"),
        ({"proj_drop_rate": 0.1}, "dropout"),
        ({"patch_drop_rate": 0.1}, "patch_drop_rate"),
        ({"pre_norm": True}, "norm_pre"),
        ({"act_layer": nn.Tanh}, "activation Tanh is not supported"),
        ({"norm_layer": "rmsnorm"}, "expected LayerNorm everywhere"),
    ],
)
def test_refusals_say_why(options, reason):
    with pytest.raises(ValueError, match=f"model: cannot be searched: .*{reason}"):
        family_of(tiny_vit(**options))


@pytest.mark.parametrize("name", ["resnet18", "swinv2_tiny_window8_256", "vit_base_patch16_clip_224"])
def test_other_models_are_refused(name):
    with torch.device("meta"):
        model = timm.create_model(name)
    with pytest.raises(ValueError, match="model: "):
        family_of(model)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "deit_tiny_distilled_patch16_224"])
def test_couplings_cover_every_dimension_that_has_the_units(name):
    """With every size a different prime, a dimension that belongs to a submodule is known by its size."""
    width, heads, head_dim, hidden = 23, 3, 5, 41
    description = describe(tiny_vit(name))
    description |= {"embed_dim": width, "blocks": [{"heads": heads, "head_dim": head_dim, "hidden": hidden}] * 2}
    model = build(description)
    submodules = vit.submodules(model)
    found = {(c.parameter, c.dim) for submodule in submodules.values() for c in submodule.couplings}
    expected = set()
    for parameter_name, parameter in model.named_parameters():
        for dim, size in enumerate(parameter.shape):
            if size in (width, heads * head_dim, 3 * heads * head_dim, hidden):
                expected.add((parameter_name, dim))
    assert found == expected


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("vit_tiny_patch16_224", {}),
        ("vit_tiny_patch16_224", {"init_values": 0.1, "qkv_bias": False, "no_embed_class": True}),
        ("deit_tiny_distilled_patch16_224", {"init_values": 0.1}),
    ],
)
def test_description_is_json_and_builds_the_same_network(name, options):
    model = tiny_vit(name, **options).eval()
    rebuilt = build(json.loads(json.dumps(describe(model)))).eval()
    rebuilt.load_state_dict(model.state_dict())
    images = torch.randn(2, 3, 16, 16)
    assert torch.equal(rebuilt(images), model(images))
    assert count_macs(rebuilt) == count_macs(model)


def test_build_bad_description():
    with pytest.raises(ValueError, match="expected family as one of vit, swin, got 'resnet'"):
        build({"family": "resnet"})
    with pytest.raises(ValueError, match="lacking .*'embed_dim'"):
        build({"family": "vit", "blocks": []})
