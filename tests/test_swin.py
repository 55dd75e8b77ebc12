"""The Swin family: the masked forward pass, what it couples, what it costs, and the search of one."""

import json

import pytest
import timm
import torch
from timm.layers import RmsNorm

import ofb
from ofb.supernet import SearchSpace, Supernet
from ofb.supernet.families import build, count_macs, describe, family_of, swin
from ofb.supernet.ranking import magnitudes
from tests.common import tiny_swin
from tests.test_cost import counted_by_torch
from tests.test_supernet import RESIDUAL_MASKS, kill_units, train


def perturbed(model) -> torch.nn.Module:
    """timm starts biases at 0 and norms at 1: a mistake could pass unseen."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def make_supernet(dtype=torch.float32, model_options=None, **options) -> Supernet:
    model = perturbed(tiny_swin(**(model_options or {}))).to(dtype)
    return Supernet(model, **({"target": "50%", "epochs": 4, "steps_per_epoch": 6} | options))


def images_of(model, batch=2, dtype=torch.float64):
    return torch.randn(batch, 3, *model.patch_embed.img_size, dtype=dtype)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"img_size": 36, "window_size": 7},  # windows that have to be filled up
        {"img_size": (32, 48), "depths": (1, 2, 1), "num_heads": (1, 2, 3), "embed_dim": 12},
        {"always_partition": True, "window_size": 16},
        {"qkv_bias": False, "global_pool": "max"},
    ],
)
def test_masks_of_ones_change_nothing(options):
    model = perturbed(tiny_swin(**options)).double().eval()
    masks = {n: torch.ones(s.candidates.full).double() for n, s in swin.submodules(model).items()}
    images = images_of(model)
    tokens = swin.features(model, swin.patch_embeddings(model, images), masks)
    torch.testing.assert_close(swin.logits(model, tokens), model(images), atol=1e-12, rtol=0)
    assert count_macs(model) == counted_by_torch(model.float().to("meta"))


@pytest.mark.parametrize(
    ("size", "published"),  # GMACs; Liu et al., ICCV 2021, table 1
    [("tiny", 4.5), ("small", 8.7), ("base", 15.4)],
)
def test_published_figures(size, published):
    with torch.device("meta"):
        model = timm.create_model(f"swin_{size}_patch4_window7_224")
    assert count_macs(model) == counted_by_torch(model)
    assert count_macs(model) / 1e9 == pytest.approx(published, rel=0.02)


def test_what_belongs_to_a_whole_head_says_nothing_of_its_channels():
    model = tiny_swin()
    before = magnitudes(model)
    with torch.no_grad():
        for block in swin.blocks(model):
            block.attn.relative_position_bias_table.add_(1)
    after = magnitudes(model)
    assert all(torch.equal(after[name], importance) for name, importance in before.items())


def test_couplings_cover_every_dimension_that_has_the_units():
    """With every size a different prime, a dimension that belongs to a submodule is known by its size."""
    description = describe(tiny_swin())
    sizes = [(23, 3, 5, 43), (29, 2, 7, 59)]
    for stage, (width, heads, head_dim, hidden) in zip(description["stages"], sizes, strict=True):
        stage |= {"embed_dim": width, "blocks": [{"heads": heads, "head_dim": head_dim, "hidden": hidden}] * 2}
    model = build(description)
    found = {(c.parameter, c.dim) for s in swin.submodules(model).values() for c in s.couplings}
    expected = set()
    for name, parameter in model.named_parameters():
        for dim, size in enumerate(parameter.shape):
            for width, heads, head_dim, hidden in sizes:
                table = "position_bias_table" in name and dim == 1 and size == heads
                if table or size in (width, 4 * width, heads * head_dim, 3 * heads * head_dim, hidden):
                    expected.add((name, dim))
    assert found == expected


@pytest.mark.parametrize("residual_mask", RESIDUAL_MASKS)
def test_pruning_preserves_the_function(residual_mask):
    supernet = make_supernet(dtype=torch.float64, residual_mask=residual_mask).eval()
    images = images_of(supernet.model)
    survivors = kill_units(supernet)
    if residual_mask == "input":  # plain LayerNorm weighs dead channels too: here the widths must stay to compare
        survivors = {name: alive for name, alive in survivors.items() if not name.startswith("embed")}
    expected = supernet(images)
    for name, alive in survivors.items():
        units = supernet.bimasks[name].candidates.units
        supernet._keep_candidates(name, alive, None, how="pruned")
        assert supernet.bimasks[name].candidates.units < units
        torch.testing.assert_close(supernet(images), expected, atol=1e-9, rtol=0)


@pytest.mark.parametrize("residual_mask", RESIDUAL_MASKS)
def test_search_ends_on_target_and_folds(residual_mask, tmp_path):
    supernet = make_supernet(residual_mask=residual_mask, mask_ratio_start=0.1, mask_ratio_end=0.25)
    train(supernet, 24, pixels=32)
    assert supernet.finished
    extracted, images = supernet.extract().eval(), images_of(supernet.model, dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(extracted(images), supernet.eval()(images), atol=1e-5, rtol=0)
    assert 0.97 * supernet.target_macs <= count_macs(extracted) <= supernet.target_macs
    assert type(extracted) is type(supernet.model)
    ofb.save(extracted, tmp_path)
    loaded = ofb.load(tmp_path)
    torch.testing.assert_close(loaded(images), extracted(images))
    assert [each.shape[1] for each in loaded.forward_intermediates(images, intermediates_only=True)] == [
        info["num_chs"] for info in loaded.feature_info
    ]


def test_resumed_search_equals_an_uninterrupted_one():
    supernet = make_supernet()
    train(supernet, 18, pixels=32)
    resumed = make_supernet()
    resumed.load_state_dict(supernet.state_dict())
    images = images_of(supernet.model, dtype=torch.float32)
    torch.testing.assert_close(resumed.eval()(images), supernet.eval()(images), atol=0, rtol=0)


def test_every_parameter_learns():
    supernet = make_supernet(mask_ratio_start=0.1, mask_ratio_end=0.25, one_hot_delay=0.0)
    supernet.loss(images_of(supernet.model, 8, torch.float32), torch.randint(5, (8,))).total.backward()
    silent = {name for name, p in supernet.named_parameters() if p.grad is None or not p.grad.any()}
    assert silent == {f"bimasks.{name}.scale" for name in supernet.bimasks}


def test_gradient_checkpointing_changes_nothing():
    supernet = make_supernet(dtype=torch.float64).eval()  # no drop path
    images, targets = images_of(supernet.model), torch.tensor([0, 3])
    gradients = []
    for enable in (False, True):
        supernet.model.set_grad_checkpointing(enable)
        gradients.append(torch.autograd.grad(supernet.loss(images, targets).total, supernet.model.norm.weight)[0])
    torch.testing.assert_close(*gradients)


def test_description_is_plain_and_rebuilds():
    model = tiny_swin(qkv_bias=False, num_classes=0)
    description = json.loads(json.dumps(describe(model)))
    rebuilt = build(description)
    rebuilt.load_state_dict(model.state_dict())
    images = images_of(model, dtype=torch.float32)
    torch.testing.assert_close(rebuilt.eval()(images), model.eval()(images), atol=0, rtol=0)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"dynamic_img_size": True}, "dynamic_img_size"),
        ({"attn_drop_rate": 0.1}, "expected no attention dropout"),
        ({"proj_drop_rate": 0.1}, "layers.0.blocks.0.attn: expected no attention dropout"),
        ({"norm_layer": RmsNorm}, "expected a LayerNorm"),
    ],
)
def test_refusals_say_why(options, reason):
    with pytest.raises(ValueError, match=f"model: cannot be searched: .*{reason}"):
        family_of(tiny_swin(**options))


def test_wrong_image_size():
    with pytest.raises(ValueError, match="images: expected 32 × 32 pixels, got 40 × 32; resize them"):
        make_supernet()(torch.randn(1, 3, 40, 32))


def test_triton_agrees_with_the_reference(device):
    losses = []
    for backend in ("reference", "triton"):
        torch.manual_seed(0)
        supernet = make_supernet(backend=backend, model_options={"drop_path_rate": 0.0}).to(device)
        loss = supernet.loss(images_of(supernet.model, dtype=torch.float32).to(device), torch.tensor([0, 3]).to(device))
        table = supernet.model.layers[1].blocks[1].attn.relative_position_bias_table
        losses.append((loss.total, *torch.autograd.grad(loss.total, [table, supernet.bimasks["attn3"].alpha])))
    for reference, triton in zip(*losses, strict=True):
        torch.testing.assert_close(triton, reference, atol=1e-5, rtol=1e-4)


def test_onnx_computes_the_same(tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    supernet = make_supernet()
    train(supernet, 24, pixels=32)
    network, images = supernet.extract().eval(), images_of(supernet.model, 3, torch.float32)
    ofb.export_onnx(network, tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    (got,) = session.run(None, {"images": images.numpy()})
    torch.testing.assert_close(torch.from_numpy(got), network(images).detach(), atol=1e-4, rtol=0)


def test_masked_areas_must_divide_the_image():
    with pytest.raises(ValueError, match="img_size as a multiple of 8 pixels"):
        make_supernet(model_options={"img_size": 36}, mask_ratio_end=0.25)
    make_supernet(model_options={"img_size": 36})


def test_frozen_submodules_stay_and_the_rest_ends_on_target():
    supernet = make_supernet(space=SearchSpace(freeze=("embed*", "attn0"), bounds={"mlp*": (0.25, 0.875)}))
    train(supernet, 24, pixels=32)
    extracted = supernet.extract().eval()
    assert supernet.finished and 0.98 <= count_macs(extracted) / supernet.target_macs <= 1
    sizes = {name: submodule.candidates.full for name, submodule in swin.submodules(extracted).items()}
    before = {name: submodule.candidates.full for name, submodule in swin.submodules(tiny_swin()).items()}
    assert all(sizes[name] == before[name] for name in ("embed0", "embed1", "attn0"))
    images = images_of(extracted, dtype=torch.float32)
    torch.testing.assert_close(extracted(images), supernet.eval()(images), atol=1e-5, rtol=1e-5)
