"""The Eva family: what it refuses, what has its heads searched as a whole, and what its attention becomes."""

import pytest
import timm
import torch
from timm.layers import AttentionRope
from timm.models.eva import EvaAttention
from torch import nn

import ofb
from ofb.supernet.families import build, describe, eva, family_of
from tests.common import tiny_vit


@pytest.mark.parametrize(
    ("name", "options", "reason"),
    [
        ("vit_small_patch16_rope_mixed_224", {}, "rotary positions of kind RotaryEmbeddingMixed are not supported"),
        ("eva02_enormous_patch14_clip_224", {}, "expected timm's pre-norm EvaBlock, got EvaBlockPostNorm"),
        ("vit_small_patch16_rope_224", {"num_kv_heads": 2, "qkv_fused": False}, "heads that share keys and values"),
        ("eva02_tiny_patch14_224", {"patch_drop_rate": 0.1}, "patch_drop_rate"),
        ("eva02_tiny_patch14_224", {"attn_drop_rate": 0.1}, "blocks.0.attn: expected no attention dropout"),
    ],
)
def test_refusals_say_why(name, options, reason):
    try:
        model = tiny_vit(name, **options)
    except TypeError:
        pytest.skip(f"this timm has no such option: {options}")
    with pytest.raises(ValueError, match=f"model: cannot be searched: .*{reason}"):
        family_of(model)


def test_an_activation_that_timm_does_not_put_there_is_refused():
    model = tiny_vit("eva_giant_patch14_224")
    for block in model.blocks:
        block.mlp.act = nn.ReLU()
    assert "expected the MLP that timm's Eva makes, with gelu, got one with relu" in ofb.supports(model).reason


def test_heads_are_searched_as_a_whole_where_they_are_rotated():
    rotated = eva.submodules(tiny_vit("eva02_tiny_patch14_224"))["attn0"].candidates
    plain = eva.submodules(tiny_vit("eva_giant_patch14_224"))["attn0"].candidates
    assert (rotated.heads, rotated.channels) == ((2, 4), (8,))
    assert (plain.heads, plain.channels) == ((2, 4), (2, 3, 4, 5, 6, 7, 8))


@pytest.mark.parametrize("options", [{}, {"qkv_fused": False}, {"qkv_bias": False}, {"scale_norm": True}])
def test_attention_of_any_width_computes_the_same(options):
    attn = EvaAttention(32, 4, norm_layer=nn.LayerNorm, **({"scale_norm": False} | options)).double()
    with torch.no_grad():
        for parameter in attn.parameters():
            parameter.normal_()
    x, rope = torch.randn(2, 10, 32, dtype=torch.float64), torch.randn(9, 16, dtype=torch.float64)
    with torch.no_grad():
        new = eva._attention_of_any_width(attn)
    assert type(new) is AttentionRope
    torch.testing.assert_close(new(x, rope=rope), attn(x, rope=rope))


def test_dense_network_keeps_its_attention(tmp_path):
    model = tiny_vit("eva02_tiny_patch14_224").eval()
    ofb.save(model, tmp_path)
    loaded = ofb.load(tmp_path)
    images = torch.randn(2, 3, 16, 16)
    assert type(loaded.blocks[0].attn) is EvaAttention
    assert torch.equal(loaded(images), model(images))


def test_full_size_description_keeps_rotary_options():
    with torch.device("meta"):
        model = timm.create_model("eva02_base_patch14_448")
        rebuilt = build(describe(model))
    assert describe(rebuilt) == describe(model)
    assert rebuilt.rope.ref_feat_shape == model.rope.ref_feat_shape == (16, 16)
    assert {n: p.shape for n, p in rebuilt.named_parameters()} == {n: p.shape for n, p in model.named_parameters()}


def test_build_bad_description():
    with pytest.raises(ValueError, match="lacking .*'rope'"):
        build({"family": "eva", "blocks": []})
