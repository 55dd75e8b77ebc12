"""Saved networks load as they were, in timm, in ONNX and as programs too, and damaged ones say so."""

import json
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import timm
import torch
from timm.models import PretrainedCfg

import ofb
import ofb.export.programs
from ofb.engine.class_names import label_names, set_label_names
from ofb.engine.data import data_config
from ofb.export import ARCHITECTURE, WEIGHTS, count_params, model_card
from ofb.supernet import SearchSpace
from ofb.supernet.families import count_macs, describe
from tests.common import tiny_swin, tiny_vit

DINOV3 = {"img_size": 32, "embed_dim": 48, "depth": 2, "num_heads": 4, "num_classes": 5}
NETWORKS = {
    "vit": tiny_vit,
    "distilled": lambda: tiny_vit("deit_tiny_distilled_patch16_224"),
    "eva": lambda: timm.create_model("vit_small_patch16_dinov3", **DINOV3),
    "swin": tiny_swin,
}


def pruned_network(model, **options) -> torch.nn.Module:
    """Each block has sizes of its own."""
    supernet = ofb.Supernet(model, target="45%", **options)
    with torch.no_grad():
        for parameter in supernet.model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return supernet.extract().eval()


def noise(model, batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, *data_config(model)["input_size"])


@pytest.fixture
def pruned():
    return pruned_network(tiny_vit())


def test_saved_network_loads_as_it_was(pruned, tmp_path):
    ofb.save(pruned, tmp_path / "network")
    loaded = ofb.load(tmp_path / "network")
    images = torch.randn(3, 3, 16, 16)
    assert torch.equal(loaded(images), pruned(images))
    assert type(loaded) is type(pruned)
    assert not loaded.training
    config = json.loads((tmp_path / "network" / ARCHITECTURE).read_text())
    assert (config["macs"], config["params"]) == (count_macs(pruned), count_params(pruned))


NO_CFG = object()
CFGS = {
    "none": None,
    "missing": NO_CFG,
    "empty": {},
    "dict": {"mean": [0.1, 0.2, 0.3], "std": (0.5, 0.5, 0.5)},
    "timm's": PretrainedCfg(mean=(0.1, 0.2, 0.3), label_names=list("abcde")),
}


def with_cfg(model, cfg):
    """A model as others make it, who may set what timm's `create_model` sets, or not."""
    if cfg is NO_CFG:
        del model.pretrained_cfg, model.default_cfg
    else:
        model.pretrained_cfg = model.default_cfg = cfg
    return model


@pytest.mark.parametrize("kind", CFGS)
@pytest.mark.parametrize("family", [tiny_vit, tiny_swin])
def test_whatever_a_model_says_of_its_pretrained_cfg(family, kind, tmp_path):
    network = with_cfg(family(), CFGS[kind]).eval()
    images = torch.randn(2, 3, *network.patch_embed.img_size)
    ofb.save(network, tmp_path)
    loaded = [ofb.load(tmp_path), timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()]
    for each in loaded:
        assert torch.equal(each(images), network(images))
        assert (each.pretrained_cfg["mean"] == (0.1, 0.2, 0.3)) == (kind in ("dict", "timm's"))
    assert label_names(loaded[0]) == (tuple("abcde") if kind == "timm's" else ())
    assert ("mean 0.1, 0.2, 0.3" in model_card(tmp_path, "me/it")) == (kind in ("dict", "timm's"))
    set_label_names(network, SimpleNamespace(class_to_idx={name: index for index, name in enumerate("vwxyz")}))
    assert label_names(network) == tuple("vwxyz")


@pytest.mark.parametrize("family", NETWORKS)
def test_timm_loads_the_folder(family, tmp_path):
    network = pruned_network(NETWORKS[family]())
    ofb.save(network, tmp_path)
    loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    images = noise(network)
    assert type(loaded) is type(network)
    assert torch.equal(loaded(images), network(images))
    assert torch.equal(ofb.load(tmp_path)(images), network(images))
    assert timm.data.resolve_model_data_config(loaded) == data_config(network)


@pytest.mark.parametrize("family", NETWORKS)
def test_what_timm_can_change(family, tmp_path):
    network = pruned_network(NETWORKS[family]())
    ofb.save(network, tmp_path)
    name, size = f"local-dir:{tmp_path}", network.patch_embed.img_size[0]
    changed = timm.create_model(
        name, pretrained=True, num_classes=7, in_chans=1, img_size=2 * size, drop_rate=0.1, drop_path_rate=0.2
    )
    assert changed(torch.randn(2, 1, 2 * size, 2 * size)).shape == (2, 7)
    weights, before = changed.state_dict(), network.state_dict()
    kept = [key for key in before if key.endswith("mlp.fc1.weight")]
    assert kept and all(torch.equal(weights[key], before[key]) for key in kept)
    rates = [module.drop_prob for module in changed.modules() if isinstance(module, timm.layers.DropPath)]
    assert max(rates) == pytest.approx(0.2)
    features = timm.create_model(name, pretrained=True, features_only=True).eval()
    widths = [level.shape[1] for level in features(noise(network))]
    assert widths == features.feature_info.channels() and widths[-1] == network.num_features
    untrained = timm.create_model(name)
    assert not torch.equal(untrained.state_dict()[kept[0]], before[kept[0]])


def test_network_of_chosen_positions(tmp_path):
    network = pruned_network(tiny_vit(), space=SearchSpace(tokens=True))
    ofb.save(network, tmp_path)
    images = noise(network)
    assert torch.equal(timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()(images), network(images))
    with pytest.raises(ValueError, match=r"img_size: expected \(16, 16\), because .* got \(32, 32\)"):
        timm.create_model(f"local-dir:{tmp_path}", pretrained=True, img_size=32)


def test_entry_point_without_sizes():
    with pytest.raises(ValueError, match='network: expected the sizes of a saved network, got None; .*"local-dir:'):
        timm.create_model("ofb_network")


def test_another_pooling_is_refused(pruned, tmp_path):
    ofb.save(pruned, tmp_path)
    with pytest.raises(ValueError, match="global_pool: expected 'token', the network's own, got 'avg'"):
        timm.create_model(f"local-dir:{tmp_path}", pretrained=True, global_pool="avg")


@pytest.mark.parametrize("family", ["vit", "swin"])
def test_timm_saves_it_too(family, tmp_path):
    network = pruned_network(NETWORKS[family]())
    ofb.save(network, tmp_path / "ours")
    loaded, images = ofb.load(tmp_path / "ours"), noise(network)
    sizes = {"network": describe(network)}  # older timm does not remember what a model was made with
    timm.models.save_for_hf(loaded, str(tmp_path / "theirs"), model_args=sizes, safe_serialization=True)
    for load in (ofb.load, lambda folder: timm.create_model(f"local-dir:{folder}", pretrained=True).eval()):
        assert torch.equal(load(tmp_path / "theirs")(images), network(images))


def test_labels_stay(pruned, tmp_path):
    pruned.pretrained_cfg |= {"label_names": ["a", "b", "c", "d", "e"], "url": "https://example.com/dense.bin"}
    ofb.save(pruned, tmp_path)
    cfg = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).pretrained_cfg
    assert tuple(cfg["label_names"]) == ("a", "b", "c", "d", "e")
    assert "url" not in cfg, "the weights are no longer those of the dense network"


def test_folders_of_earlier_versions_load(pruned, tmp_path):
    ofb.save(pruned, tmp_path)
    data = data_config(pruned) | {"mean": (0.1, 0.2, 0.3)}
    earlier = {"format": 1, "architecture": describe(pruned), "macs": 1, "params": 1, "data": data}
    (tmp_path / ARCHITECTURE).write_text(json.dumps(earlier))
    loaded, images = ofb.load(tmp_path), noise(pruned)
    assert torch.equal(loaded(images), pruned(images))
    assert data_config(loaded)["mean"] == (0.1, 0.2, 0.3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda n: n["stages"][0]["blocks"][0].update(hidden=10**12),
            "layers.0.blocks.0.mlp.fc1.bias: expected .10000",
        ),
        (lambda n: n["stages"][0]["blocks"][0].update(hidden=-1), "config.json is damaged"),
        (lambda n: n["stages"][0]["blocks"].pop(), "layers.0.blocks.1.* expected none, got"),
        (lambda n: n.update(img_size=[2**18, 2**18]), "expected tables of at most"),
        (lambda n: n.update(num_classes=6), "head.fc.bias: expected .6,., got .5,."),
    ],
)
def test_sizes_are_checked_before_memory_is_taken(tmp_path, change, message):
    ofb.save(tiny_swin(), tmp_path)
    config = json.loads((tmp_path / ARCHITECTURE).read_text())
    change(config["model_args"]["network"])
    (tmp_path / ARCHITECTURE).write_text(json.dumps(config))
    start = time.monotonic()
    with pytest.raises(ValueError, match=message):
        ofb.load(tmp_path)
    with pytest.raises(ValueError, match=message.replace("config.json is damaged", "network: expected sizes")):
        timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
    assert time.monotonic() - start < 10


def test_onnx_computes_the_same(pruned, tmp_path):
    import onnxruntime

    path = tmp_path / "model.onnx"
    assert ofb.export_onnx(pruned, path) < 1e-4
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    for batch in (1, 2, 7):
        images = noise(pruned, batch)
        (logits,) = session.run(["logits"], {"images": images.numpy()})
        torch.testing.assert_close(torch.from_numpy(logits), pruned(images).detach(), atol=1e-4, rtol=1e-4)


def test_program_needs_neither_timm_nor_this_package(tmp_path):
    network, path = pruned_network(tiny_swin()).train(), tmp_path / "model.pt2"
    assert ofb.export_program(network, path) < 1e-4
    assert network.training
    assert b"site-packages" not in path.read_bytes(), "it would tell of this machine's folders"
    batches = [noise(network, batch) for batch in (1, 2, 7)]
    torch.save(batches, tmp_path / "images.pt")
    code = (
        "import sys; sys.modules.update(dict.fromkeys(['timm', 'ofb', 'ofb_kernels', 'torchvision']))\n"
        "import torch\n"
        "run = torch.export.load('model.pt2').module()\n"
        "batches = torch.load('images.pt', weights_only=True)\n"
        "torch.save([run(images).detach() for images in batches], 'logits.pt')\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)
    logits = torch.load(tmp_path / "logits.pt", weights_only=True)
    for each, expected in zip(logits, map(network.eval(), batches), strict=True):
        torch.testing.assert_close(each, expected)


@pytest.mark.parametrize("write", [ofb.export_onnx, ofb.export_program])
def test_file_that_computes_something_else_is_not_written(pruned, tmp_path, monkeypatch, write):
    monkeypatch.setattr(ofb.export.programs, "TOLERANCE", -1.0)  # what no file meets
    with pytest.raises(ValueError, match="export: expected the network's logits within"):
        write(pruned, tmp_path / "model")
    assert not list(tmp_path.iterdir())


def test_onnx_without_its_extra(pruned, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'ofb-kernels\[export\]'"):
        ofb.export_onnx(pruned, tmp_path / "model.onnx")


def test_too_large_for_onnx(pruned, tmp_path, monkeypatch):
    monkeypatch.setattr(ofb.export.programs, "ONNX_LIMIT", 1000)
    with pytest.raises(ValueError, match="onnx: expected weights below 2 GiB.*export a program instead"):
        ofb.export_onnx(pruned, tmp_path / "model.onnx")


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        (ARCHITECTURE, lambda text: text[: len(text) // 2], "config.json is damaged"),
        (ARCHITECTURE, lambda text: text.replace(b'"vit"', b'"os.system"'), "config.json is damaged.*expected family"),
        (ARCHITECTURE, lambda text: text.replace(b'"embed_dim"', b'"width"'), "config.json is damaged.*embed_dim"),
        (WEIGHTS, lambda data: data[: len(data) // 2], "model.safetensors is damaged"),
        (WEIGHTS, lambda data: b"", "model.safetensors is damaged"),
    ],
)
def test_damaged_network(pruned, tmp_path, name, damage, message):
    ofb.save(pruned, tmp_path)
    (tmp_path / name).write_bytes(damage((tmp_path / name).read_bytes()))
    with pytest.raises(ValueError, match=message):
        ofb.load(tmp_path)


def test_nothing_saved_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="found no config.json$"):
        ofb.load(tmp_path)


def test_networks_of_several_targets(pruned, tmp_path):
    ofb.save(pruned, tmp_path / "50%")
    with pytest.raises(FileNotFoundError, match="found no config.json; there are networks in .*50%"):
        ofb.load(tmp_path)


def test_models_of_no_known_family_are_refused(tmp_path):
    with pytest.raises(ValueError, match="expected a timm VisionTransformer"):
        ofb.save(torch.nn.Linear(2, 2), tmp_path / "network")
    assert not (tmp_path / "network").exists()
