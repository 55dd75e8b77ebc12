"""The ViT family: what it refuses, what it couples, and how it describes a model."""

import json
import re
from functools import partial

import pytest
import timm
import torch
from timm.layers import GatedMlp
from timm.models.vision_transformer import ParallelScalingBlock, ResPostBlock
from torch import nn

import ofb
from ofb.supernet.families import build, count_macs, describe, family_of
from tests.common import tiny_vit


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"attn_drop_rate": 0.1}, "blocks.0.attn: expected no attention dropout"),
        ({"proj_drop_rate": 0.1}, "dropout"),
        ({"patch_drop_rate": 0.1}, "patch_drop_rate"),
        ({"act_layer": nn.Tanh}, "blocks.0.mlp: activation Tanh is not supported"),
        ({"norm_layer": "simplenorm"}, "expected LayerNorm or RmsNorm with weights everywhere, got SimpleNorm"),
        ({"norm_layer": partial(nn.LayerNorm, elementwise_affine=False)}, "with weights everywhere, got LayerNorm"),
        ({"embed_norm_layer": "rmsnorm"}, "the same kind of norm"),
        ({"attn_layer": "diff"}, "blocks.0.attn: expected timm's Attention, got DiffAttention"),
        ({"block_fn": ParallelScalingBlock}, "blocks.0: expected timm's pre-norm Block, got ParallelScalingBlock"),
        ({"block_fn": ResPostBlock}, "blocks.0: expected timm's pre-norm Block, got ResPostBlock"),
        ({"mlp_layer": GatedMlp}, "blocks.0.mlp: expected timm's Mlp, GluMlp or SwiGLU, got GatedMlp"),
    ],
)
def test_refusals_say_why(options, reason):
    with pytest.raises(ValueError, match=f"model: cannot be searched: .*{reason}"):
        family_of(tiny_vit(**options))
    support = ofb.supports(tiny_vit(**options))
    assert not support and re.search(reason, support.reason)


def test_other_attention_pools_are_refused():
    model = tiny_vit(global_pool="map")
    model.attn_pool = nn.Linear(32, 32)
    with pytest.raises(ValueError, match="expected AttentionPoolLatent where there is one, got Linear"):
        family_of(model)


def test_blocks_of_several_kinds_are_refused():
    model = tiny_vit(init_values=0.1)
    model.blocks[1].ls1 = nn.Identity()
    with pytest.raises(ValueError, match="expected the same options in all blocks"):
        family_of(model)


def test_support_is_as_true_as_it_says():
    assert ofb.supports(tiny_vit()) and ofb.supports(tiny_vit()).reason == ""
    support = ofb.supports(timm.create_model("resnet18"))
    assert (bool(support), support.supported) == (False, False)
    expected = "expected a timm VisionTransformer (ViT, DeiT), Eva or SwinTransformer"
    assert support.reason == f"{expected}, got timm.models.resnet.ResNet"


@pytest.mark.parametrize("name", ["resnet18", "beit_base_patch16_224", "vit_small_r26_s32_224"])
def test_other_models_are_refused(name):
    with torch.device("meta"):
        model = timm.create_model(name)
    with pytest.raises(ValueError, match="model: "):
        family_of(model)


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
    with pytest.raises(ValueError, match="expected family as one of vit, .*got 'resnet'"):
        build({"family": "resnet"})
    with pytest.raises(ValueError, match="lacking .*'embed_dim'"):
        build({"family": "vit", "blocks": []})


def test_descriptions_of_earlier_versions_build():
    """They know neither pooling nor registers, norms or MLPs of several kinds."""
    description = {
        "family": "vit", "distilled": False, "img_size": [28, 28], "patch_size": 7, "in_chans": 1, "num_classes": 10,
        "embed_dim": 64, "no_embed_class": False, "qkv_bias": True, "proj_bias": True, "layer_scale": False,
        "norm_eps": 1e-6, "activation": "gelu", "blocks": [{"heads": 3, "head_dim": 5, "hidden": 41}] * 2,
    }  # fmt: skip
    model = build(description)
    assert model(torch.randn(2, 1, 28, 28)).shape == (2, 10)
    assert describe(model).items() >= description.items()
