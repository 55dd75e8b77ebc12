"""Networks that come from transformers, or go there, compute what they computed."""

import sys

import pytest
import timm
import torch
import transformers
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer

import ofb
from ofb.engine.data import data_config
from ofb.supernet.families import vit
from ofb.supernet.families.layers import ACTIVATION_LAYERS
from tests.common import tiny_vit

CLASSIFYING = ["ViTForImageClassification", "DeiTForImageClassification", "DeiTForImageClassificationWithTeacher"]
BARE = ["ViTModel", "DeiTModel"]
IMAGES = (3, 3, 16, 24)


def randomized(model: torch.nn.Module) -> torch.nn.Module:
    """The model in float64 and eval mode, every parameter random: none is zero, one, or equal to another."""
    with torch.no_grad():
        for parameter in model.double().parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


def hf_model(name: str, **options) -> torch.nn.Module:
    sizes = dict(hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=56)
    images = dict(image_size=IMAGES[2:], patch_size=4, num_labels=5)
    cls = getattr(transformers, name)
    return randomized(cls(cls.config_class(**(sizes | images | options))))


def images_for(dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(IMAGES, dtype=dtype)


def assert_same(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal up to the order of sums in float64."""
    torch.testing.assert_close(actual, expected, atol=1e-12, rtol=1e-12)


def assert_same_tensors(actual: torch.nn.Module, expected: torch.nn.Module) -> None:
    actual, expected = actual.state_dict(), expected.state_dict()
    assert actual.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(actual[name], expected[name])] == []


@pytest.mark.parametrize("name", CLASSIFYING)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"qkv_bias": False, "hidden_act": "gelu_new"},
        {"hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-2},
        {"hidden_act": "relu", "head_dim": 6},
        {"hidden_act": "silu", "num_channels": 3, "patch_size": [4, 4]},
        {"hidden_act": "swish"},
    ],
    ids=str,
)
def test_logits_from_transformers(name, options):
    theirs, images = hf_model(name, **options), images_for()
    ours = ofb.from_transformers(theirs)
    assert type(ours) is (VisionTransformer if name.startswith("ViT") else VisionTransformerDistilled)
    assert_same(ours(images), theirs(images).logits)


@pytest.mark.parametrize("name", BARE)
def test_features_from_transformers(name):
    theirs, images = hf_model(name), images_for()
    ours = ofb.from_transformers(theirs)
    assert ours.num_classes == 0
    assert_same(ours.forward_features(images), theirs(images).last_hidden_state)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "deit_tiny_distilled_patch16_224"])
@pytest.mark.parametrize("num_classes", [5, 0])
@pytest.mark.parametrize(
    "options",
    [
        {"qkv_bias": False, "act_layer": "relu"},
        {"act_layer": ACTIVATION_LAYERS["gelu_tanh"], "img_size": IMAGES[2:], "in_chans": 1},
        {"act_layer": "silu", "mlp_ratio": 2.7},
    ],
    ids=["relu", "gelu_tanh", "silu"],
)
def test_outputs_to_transformers(name, num_classes, options):
    ours = randomized(tiny_vit(name, num_classes=num_classes, **options))
    images = torch.randn(2, *data_config(ours)["input_size"], dtype=torch.float64)
    theirs = ofb.to_transformers(ours)
    if num_classes:
        assert_same(theirs(images).logits, ours(images))
    else:
        assert_same(theirs(images).last_hidden_state, ours.forward_features(images))


@pytest.mark.parametrize("name", ["ViTForImageClassification", "DeiTForImageClassificationWithTeacher"])
@pytest.mark.parametrize("qkv_bias", [True, False])
def test_there_and_back_from_transformers(name, qkv_bias):
    theirs = hf_model(name, qkv_bias=qkv_bias, head_dim=6)
    back = ofb.to_transformers(ofb.from_transformers(theirs))
    assert type(back) is type(theirs)
    assert back.config.to_diff_dict() == theirs.config.to_diff_dict()
    assert_same_tensors(back, theirs)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "deit_tiny_distilled_patch16_224"])
@pytest.mark.parametrize("num_classes", [5, 0])
def test_there_and_back_from_timm(name, num_classes):
    ours = randomized(tiny_vit(name, num_classes=num_classes))
    back = ofb.from_transformers(ofb.to_transformers(ours))
    assert type(back) is type(ours)
    assert_same_tensors(back, ours)


def test_copies_in_the_same_dtype_and_mode():
    theirs = hf_model("ViTForImageClassification").bfloat16().train()
    ours = ofb.from_transformers(theirs)
    back = ofb.to_transformers(ours)
    assert ours.training and back.training
    assert {weight.dtype for model in (ours, back) for weight in model.parameters()} == {torch.bfloat16}
    storages = [{weight.data_ptr() for weight in model.parameters()} for model in (theirs, ours, back)]
    assert not storages[0] & storages[1] and not storages[1] & storages[2]


@pytest.mark.parametrize("name", CLASSIFYING)
def test_a_search_starts_from_transformers(name):
    model = ofb.from_transformers(hf_model(name).float())
    supernet = ofb.Supernet(model, target="50%", epochs=2, steps_per_epoch=2)
    optimizer = torch.optim.AdamW(supernet.parameter_groups(), lr=1e-3)
    for _ in range(2):
        loss = supernet.loss(images_for(torch.float32), torch.tensor([0, 1, 4])).total
        loss.backward()
        assert torch.isfinite(loss)
        optimizer.step()
        optimizer.zero_grad()
        supernet.step(optimizer)
    assert supernet.extract().eval()(images_for(torch.float32)).shape == (3, 5)


def test_evenly_pruned_network_is_saved_and_loaded_by_transformers(tmp_path):
    """Blocks of one size that no longer fit the width: 4 heads of 6 channels, 31 wide."""
    description = {**vit.describe(tiny_vit()), "embed_dim": 31}
    description["blocks"] = [{"heads": 4, "head_dim": 6, "hidden": 50}] * 2
    ours = randomized(vit.build(description))
    images = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    ofb.to_transformers(ours).save_pretrained(tmp_path)
    loaded = transformers.ViTForImageClassification.from_pretrained(tmp_path, dtype=torch.float64)
    assert_same(loaded(images).logits, ours(images))
    assert_same(ofb.from_transformers(loaded)(images), ours(images))


def test_images_and_labels_are_carried_over():
    labels = {0: "cat", 1: "dog", 2: "owl", 3: "fox", 4: "hen"}
    theirs = hf_model("ViTForImageClassification", id2label=labels, label2id={v: k for k, v in labels.items()})
    processor = transformers.ViTImageProcessor(image_mean=[0.1, 0.2, 0.3], image_std=[0.4, 0.5, 0.6])
    ours = ofb.from_transformers(theirs, processor)
    assert ours.pretrained_cfg["label_names"] == ("cat", "dog", "owl", "fox", "hen")
    data = data_config(ours)
    assert (data["mean"], data["std"], data["input_size"]) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6), (3, 16, 24))
    back = ofb.to_transformers(ours).config
    assert (back.id2label, back.label2id) == (theirs.config.id2label, theirs.config.label2id)


def test_images_of_unknown_or_no_normalization():
    theirs = hf_model("ViTForImageClassification")
    assert not {"mean", "std"} & ofb.from_transformers(theirs).pretrained_cfg.keys()
    data = data_config(ofb.from_transformers(theirs, transformers.ViTImageProcessor(do_normalize=False)))
    assert (data["mean"], data["std"]) == ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: torch.nn.Linear(2, 2), "expected one of transformers' ViTForImageClassification.*got .*Linear"),
        (lambda: hf_model("ViTForMaskedImageModeling", encoder_stride=4), "ViTForMaskedImageModeling.*attribute `vit`"),
        (lambda: hf_model("ViTForImageClassification", hidden_act="quick_gelu"), "hidden_act as one of.*'quick_gelu'"),
        (lambda: hf_model("ViTForImageClassification", patch_size=[4, 8]), r"square patches, got .*\[4, 8\]"),
        (lambda: hf_model("DeiTForImageClassification", num_labels=0), "num_labels of 1 or more, got 0.*model.deit"),
    ],
)
def test_models_that_cannot_come_are_refused(model, message):
    with pytest.raises(ValueError, match=message):
        ofb.from_transformers(model())


def test_models_with_other_parameters_are_refused():
    theirs = hf_model("ViTForImageClassification")
    theirs.vit.layers[1].mlp.fc1 = torch.nn.Sequential(theirs.vit.layers[1].mlp.fc1)  # as an adapter does
    with pytest.raises(ValueError, match="lacking vit.layers.1.mlp.fc1.bias and 1 more; merge adapters"):
        ofb.from_transformers(theirs)


def test_network_whose_blocks_differ_is_refused():
    description = vit.describe(tiny_vit())
    description["blocks"][1] = {"heads": 3, "head_dim": 6, "hidden": 50}
    with pytest.raises(ValueError, match=r"4×8, 128; 3×6, 50; keep the timm network \(ofb.save\).*ofb.export_onnx"):
        ofb.to_transformers(vit.build(description))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"init_values": 0.1}, "layer scale"),
        ({"no_embed_class": True}, "no_embed_class"),
        ({"proj_bias": False}, "proj_bias"),
        ({"reg_tokens": 2}, "expected reg_tokens=0, got 2; keep"),
    ],
)
def test_networks_that_cannot_go_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ofb.to_transformers(tiny_vit(**options))


def test_models_of_no_known_family_are_refused():
    with pytest.raises(ValueError, match="expected a timm VisionTransformer"):
        ofb.to_transformers(timm.create_model("resnet10t"))


def test_transformers_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'ofb-kernels\[transformers\]'"):
        ofb.to_transformers(tiny_vit())


def test_transformers_is_too_old(monkeypatch):
    monkeypatch.setattr("transformers.__version__", "4.57.6")
    with pytest.raises(ImportError, match="expected version 5.9 or newer, got 4.57.6"):
        ofb.to_transformers(tiny_vit())
