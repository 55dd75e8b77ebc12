"""Every kind of plain ViT that timm has, small: searched, pruned, folded, counted, saved, and used as a backbone."""

import copy

import pytest
import timm
import torch
from timm.layers import GluMlp, SwiGLU, SwiGLUPacked
from timm.models._features import FeatureGetterNet
from torch.utils.flop_counter import FlopCounterMode

import ofb
from ofb.supernet import Supernet
from ofb.supernet.families import build, count_macs, describe, family_of
from tests.common import tiny_vit
from tests.test_supernet import RESIDUAL_MASKS, kill_units

POOLED = {"class_token": False, "global_pool": "avg"}
# One of each kind: the entry point, and what makes it small where `tiny_vit` does not suffice.
MODELS = {
    "avg": ("vit_base_patch16_gap_224", {}),
    "avgmax, fc_norm": ("vit_tiny_patch16_224", {"global_pool": "avgmax"}),
    "max, with prefix": ("vit_tiny_patch16_224", {"global_pool": "max", "pool_include_prefix": True}),
    "map": ("vit_base_patch16_siglip_224", {"num_classes": 5}),
    "map, registers": ("test_vit3", {"qkv_bias": True}),
    "registers, fc_norm": ("vit_base_patch16_reg4_gap_256", {}),
    "DINOv2, registers": ("vit_small_patch14_reg4_dinov2", {}),
    "DINOv2-g, SwiGLU": ("vit_giant_patch14_dinov2", {"mlp_ratio": 2.0}),
    "CLIP, norm_pre": ("vit_base_patch16_clip_224", {}),
    "CLIP, quick GELU": ("vit_base_patch16_clip_quickgelu_224", {}),
    "SigLIP, GELU tanh": ("vit_base_patch32_siglip_gap_256", {}),
    "AIMv2, RMSNorm everywhere": ("aimv2_large_patch14_224", {"mlp_ratio": 2.0}),
    "BEiT-3, norms inside": ("beit3_base_patch16_224", {}),
    "RADIO, no final norm": ("vit_base_patch16_radio_v3", {}),
    "InternViT, dynamic size": ("vit_intern300m_patch14_448", {}),
    "qk-norm": ("vit_tiny_patch16_224", {"qk_norm": True, "dynamic_img_size": True}),
    "qk-norm, RMSNorm, norm_pre": (
        "vit_tiny_patch16_224",
        {"qk_norm": True, "norm_layer": "rmsnorm", "pre_norm": True},
    ),
    "SwiGLU, norms inside": (
        "vit_tiny_patch16_224",
        {"mlp_layer": SwiGLU, "act_layer": "silu", "scale_mlp_norm": True, "norm_layer": "rmsnorm"},
    ),
    "GLU, gate last": ("vit_tiny_patch16_224", {"mlp_layer": GluMlp, "mlp_ratio": 2.0}),
    "packed SwiGLU, no bias": ("vit_tiny_patch16_224", {"mlp_layer": SwiGLUPacked, "proj_bias": False}),
    "no position embedding": ("vit_tiny_patch16_224", {"pos_embed": "none"} | POOLED),
    "norm in the patch embedding": ("vit_tiny_patch16_224", {"embed_norm_layer": "layernorm", "no_embed_class": True}),
    "not square": ("vit_tiny_patch16_224", {"img_size": (16, 32), "patch_size": (4, 8)}),
    "patches do not cover the images": ("vit_tiny_patch16_224", {"img_size": (17, 18)}),
    "distilled": ("deit_tiny_distilled_patch16_224", {}),
    "DeiT-III, LayerScale": ("deit3_small_patch16_224", {}),
    "EVA": ("eva_giant_patch14_224", {"mlp_ratio": 4.0}),
    "EVA02, packed SwiGLU": ("eva02_tiny_patch14_224", {"mlp_ratio": 2.0}),
    "EVA02-B, SwiGLU, norm inside": ("eva02_base_patch14_224", {"mlp_ratio": 2.0}),
    "EVA02-CLIP, norms inside": ("eva02_base_patch16_clip_224", {"mlp_ratio": 2.0}),
    "EVA, attention norm, fused qkv": ("eva_giant_patch14_224", {"scale_attn_inner": True, "qkv_bias": False}),
    "DINOv3": ("vit_small_patch16_dinov3", {"num_classes": 5}),
    "DINOv3, SwiGLU, qkv bias": ("vit_small_plus_patch16_dinov3_qkvb", {}),
    "Perception Encoder, map": ("vit_pe_core_base_patch16_224", {"depth": 3}),
    "Perception Encoder, no final norm": ("vit_pe_spatial_base_patch16_512", {"num_classes": 5}),
    "rotary positions alone": ("vit_small_patch16_rope_224", {}),
    "rotary and absolute positions": ("vit_small_patch16_rope_ape_224", {"img_size": (16, 24)}),
    "rotary, registers, fc_norm": ("vit_base_patch16_rope_reg1_gap_256", {}),
    "Sapiens 2, qk-norm, RMSNorm": ("vit_base_patch16_sapiens2", {"num_kv_heads": 4}),
}
each_kind = pytest.mark.parametrize(
    "kind",
    [
        pytest.param(kind, marks=pytest.mark.skipif(not timm.is_model(name), reason=f"this timm has no {name}"))
        for kind, (name, _) in MODELS.items()
    ],
)


def make_model(kind, **options):
    """A small model whose weights are all random: timm starts biases at 0 and norms at 1."""
    name, special = MODELS[kind]
    defaults = {"embed_dim": 32, "init_values": 0.5} if name.startswith(("vit", "deit3")) else {}
    model = tiny_vit(name, **(defaults | special | options))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def make_supernet(kind, residual_mask="stream", dtype=torch.float32):
    masked_images = {"mask_ratio_start": 0.05, "mask_ratio_end": 0.25}
    model = make_model(kind).to(dtype)
    return Supernet(model, "60%", epochs=2, steps_per_epoch=6, residual_mask=residual_mask, **masked_images)


def make_images(model, count=4, dtype=torch.float32):
    return torch.randn(count, 3, *model.patch_embed.img_size, dtype=dtype)


def search(supernet):
    optimizer = torch.optim.AdamW(supernet.parameter_groups(architecture_lr=0.1), lr=1e-3)
    while not supernet.finished:
        images, targets = make_images(supernet.model), torch.randint(5, (4,))
        supernet.loss(images, targets).total.backward()
        optimizer.step()
        optimizer.zero_grad()
        supernet.step(optimizer)


@pytest.fixture(scope="module")
def found():
    """For each kind the supernet at the end of a search, made when it is first asked for."""
    supernets = {}

    def find(kind, residual_mask="stream"):
        if (kind, residual_mask) not in supernets:
            torch.manual_seed(0)
            supernets[kind, residual_mask] = make_supernet(kind, residual_mask)
            search(supernets[kind, residual_mask])
        return supernets[kind, residual_mask].eval()

    return find


@each_kind
def test_fully_open_masks_give_the_plain_network(kind):
    model = make_model(kind).double().eval()
    images = make_images(model, dtype=torch.float64)
    family = family_of(model)
    submodules = family.submodules(model)
    masks = {name: torch.ones(s.candidates.full, dtype=torch.float64) for name, s in submodules.items()}
    ones = {name: mask.flatten() for name, mask in masks.items()}
    tokens = family.features(model, family.patch_embeddings(model, images), masks, ones, ones)
    torch.testing.assert_close(family.logits(model, tokens, masks, ones, ones), model(images), atol=1e-9, rtol=0)


@pytest.mark.parametrize("residual_mask", RESIDUAL_MASKS)
@each_kind
def test_pruning_preserves_the_function(kind, residual_mask):
    supernet = make_supernet(kind, residual_mask, torch.float64).eval()
    images = make_images(supernet.model, dtype=torch.float64)
    survivors = kill_units(supernet)
    if residual_mask == "input":  # plain LayerNorm weighs dead channels too: here the width must stay to compare
        del survivors["embed"]
    expected = supernet(images)
    units = {name: bimask.candidates.units for name, bimask in supernet.bimasks.items()}
    for name in [name for name in survivors if not supernet.bimasks[name].final]:
        supernet._keep_candidates(name, survivors[name], None, how="pruned")
        assert supernet.bimasks[name].candidates.units < units[name]
        torch.testing.assert_close(supernet(images), expected, atol=1e-9, rtol=0)


@pytest.mark.parametrize("residual_mask", RESIDUAL_MASKS)
@each_kind
def test_search_ends_on_target_and_folding_preserves_the_function(found, kind, residual_mask):
    supernet = found(kind, residual_mask)
    extracted = supernet.extract().eval()
    assert 0.98 * supernet.target_macs <= count_macs(extracted) <= supernet.target_macs
    images = make_images(supernet.model)
    with torch.no_grad():
        expected, got = supernet(images), extracted(images)
    assert (got - expected).abs().max() <= 2e-6 * max(1.0, expected.abs().max().item())
    assert type(extracted) is type(supernet.model)
    assert not any("ofb" in type(module).__module__ for module in extracted.modules())


@each_kind
def test_macs_are_those_torch_counts(found, kind):
    dense, extracted = make_model(kind), found(kind).extract()
    for model in (dense, extracted):
        model = copy.deepcopy(model).eval().to("meta")
        with FlopCounterMode(display=False) as counter:
            model(make_images(model, 1).to("meta"))
        assert count_macs(model) == counter.get_total_flops() // 2


@each_kind
def test_saved_network_loads_as_it_was(found, kind, tmp_path):
    extracted = found(kind).extract().eval()
    ofb.save(extracted, tmp_path)
    loaded = ofb.load(tmp_path)
    images = make_images(loaded)
    assert torch.equal(loaded(images), extracted(images))
    assert describe(loaded) == describe(extracted)


@each_kind
def test_couplings_cover_every_dimension_that_has_the_units(kind):
    """With every size a different prime, a dimension that belongs to a submodule is known by its size."""
    width, heads, head_dim, hidden = 29, 3, 5, 41
    description = describe(make_model(kind))
    if description["attn_pool"] is not None:
        description["attn_pool"] |= {"heads": 1, "hidden": 37, "width": 29}
    description |= {"embed_dim": width, "blocks": [{"heads": heads, "head_dim": head_dim, "hidden": hidden}] * 2}
    model = build(description)
    found = {(c.parameter, c.dim) for s in family_of(model).submodules(model).values() for c in s.couplings}
    attention = heads * head_dim
    expected = {
        (name, dim)
        for name, parameter in model.named_parameters()
        for dim, size in enumerate(parameter.shape)
        if size in (width, 2 * width, attention, 3 * attention, hidden, 2 * hidden)
    }
    assert found == expected - {("attn_pool.latent", 2), ("attn_pool.q.weight", 1)}  # of the pool's inner width alone


@each_kind
def test_every_parameter_learns(kind):
    supernet = make_supernet(kind)
    supernet.steps = 11
    supernet._set_schedules()
    supernet.loss(make_images(supernet.model), torch.randint(5, (4,))).total.backward()
    silent = {n for n, p in supernet.named_parameters() if p.grad is None or p.grad.abs().max() == 0}
    assert silent == {
        f"bimasks.{name}.{kind}"
        for name, bimask in supernet.bimasks.items()
        for kind in (("score", "alpha") if bimask.final else ("scale",))
    }


@each_kind
def test_no_host_synchronization_between_prunes(kind):
    """Tensors on the meta device have no values: whatever waits for one raises there."""
    supernet = make_supernet(kind).to("meta")
    images = make_images(supernet.model).to("meta")
    supernet.loss(images, torch.zeros(4, dtype=torch.long, device="meta")).total.backward()


@each_kind
def test_autocast(kind):
    supernet = make_supernet(kind)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = supernet.loss(make_images(supernet.model), torch.randint(5, (4,)))
    losses.total.backward()
    assert losses.total.dtype == torch.float32 and losses.total.isfinite()


@pytest.mark.parametrize("kind", ["EVA02-B, SwiGLU, norm inside", "DINOv3", "qk-norm, RMSNorm, norm_pre"])
def test_gradient_checkpointing_changes_nothing(kind):
    supernet, gradients = make_supernet(kind), []
    images, targets = make_images(supernet.model), torch.randint(5, (4,))
    for enabled in (False, True):
        supernet.model.set_grad_checkpointing(enabled)
        torch.manual_seed(1)
        supernet.loss(images, targets).total.backward()
        gradients.append([p.grad.clone() for p in supernet.parameters() if p.grad is not None])
        supernet.zero_grad()
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, checkpointed)


@pytest.mark.parametrize("kind", ["map", "EVA02-B, SwiGLU, norm inside", "AIMv2, RMSNorm everywhere"])
def test_onnx_computes_the_same(found, kind, tmp_path):
    import onnxruntime

    extracted = found(kind).extract().eval()
    ofb.export_onnx(extracted, tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    images = make_images(extracted)
    (logits,) = session.run(["logits"], {"images": images.numpy()})
    torch.testing.assert_close(torch.from_numpy(logits), extracted(images).detach(), atol=1e-4, rtol=1e-4)


@each_kind
def test_extracted_network_is_a_backbone(found, kind):
    extracted = copy.deepcopy(found(kind).extract()).eval()
    images = make_images(extracted)
    extracted.reset_classifier(0)
    features, width = extracted(images), extracted.num_features
    assert features.shape == (4, width) and width == extracted.patch_embed.proj.out_channels
    torch.testing.assert_close(extracted.forward_head(extracted.forward_features(images)), features)
    final, maps = extracted.forward_intermediates(images, indices=2)
    torch.testing.assert_close(final, extracted.forward_features(images))
    assert [m.shape for m in maps] == [(4, width, *extracted.patch_embed.grid_size)] * 2
    assert count_macs(build(describe(extracted))) == count_macs(extracted)
    pyramid = FeatureGetterNet(extracted, out_indices=[0, 1])
    assert [m.shape[1] for m in pyramid(images)] == pyramid.feature_info.channels() == [width] * 2


@pytest.mark.parametrize("kind", ["map", "Perception Encoder, map"])
def test_pruned_attention_pool_can_be_searched_again(kind):
    supernet = make_supernet(kind)
    with torch.no_grad():
        supernet.bimasks["embed"].alpha[:, :-1] += 30  # a smaller width
    once = supernet.extract()
    assert once.embed_dim < once.attn_pool[1].q.out_features
    again = Supernet(once, "80%", epochs=2, steps_per_epoch=6)
    assert again.bimasks["embed"].final
    search(again)
    extracted, images = again.eval().extract().eval(), make_images(once)
    torch.testing.assert_close(extracted(images), again(images), atol=1e-5, rtol=1e-5)
    assert count_macs(extracted) <= again.target_macs


def test_images_of_another_size_are_refused():
    supernet = make_supernet("qk-norm")
    with pytest.raises(ValueError, match="images: expected 16 × 16 pixels, got 20 × 16; resize them"):
        supernet(torch.randn(1, 3, 20, 16))


def test_dynamic_size_stays_with_the_extracted_network(found):
    extracted = found("qk-norm").extract().eval()
    assert extracted(torch.randn(1, 3, 20, 24)).shape == (1, 5)


def test_classifier_or_criterion():
    backbone = timm.create_model("vit_tiny_patch16_224", img_size=16, patch_size=4, embed_dim=32, depth=2, num_heads=4)
    backbone.reset_classifier(0)
    with pytest.raises(ValueError, match="criterion: expected one of your own for a model without a classifier"):
        Supernet(backbone)
    supernet = Supernet(backbone, criterion=lambda features, targets, _: features.square().mean(), epochs=1)
    supernet.loss(torch.randn(2, 3, 16, 16), torch.zeros(2)).total.backward()
    assert backbone.norm.weight.grad is not None
