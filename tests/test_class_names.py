"""Names of the classes: from the folders of the images into everything that is written of a network, and back."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image
from torch.utils.data import Dataset

import ofb
from ofb.cli import main
from ofb.engine.class_names import check_label_names, class_names, label_names, set_label_names
from ofb.engine.data import Digits
from ofb.export import model_card
from tests.common import tiny_vit

NAMES = ("cat", "dog & co", "owl|3")
MODEL = "--model vit_tiny_patch16_224 --model-kwargs img_size=16 patch_size=8 embed_dim=16 depth=1 num_heads=2"
FEW = "--batch-size 6 --workers 0 --device cpu --aa None --mixup 0 --cutmix 0 --data-dir"


class Named(Dataset):
    """A data set without images, as torchvision names classes."""

    def __init__(self, *names: str) -> None:
        self.class_to_idx = {name: index for index, name in enumerate(names)}


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    random = np.random.default_rng(0)
    for split, count in (("train", 10), ("validation", 4)):
        for name in NAMES:
            (folder / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = random.integers(0, 255, (20, 24, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / split / name / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def run(images, tmp_path_factory):
    """A search of real image files, from a dense run."""
    folder = tmp_path_factory.mktemp("runs")
    data = [*FEW.split(), str(images), "--data", "", "--test-split", "validation"]
    assert main(["train", *MODEL.split(), "--epochs", "1", *data, "--output", str(folder / "dense")]) == 0
    search = f"search --checkpoint {folder}/dense --target 70% --epochs 1 --finetune-epochs 1 --round-to 1"
    assert main([*search.split(), *data, "--output", str(folder / "search")]) == 0
    return folder / "search"


def named(*names: str):
    model = tiny_vit(num_classes=len(names))
    set_label_names(model, Named(*names))
    return model


def test_names_reach_all_that_is_written(run, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    for folder in (run, run.parent / "dense"):
        assert json.loads((folder / "export" / "config.json").read_text())["label_names"] == list(NAMES)
        assert label_names(ofb.load(folder / "export")) == NAMES
    transformers = pytest.importorskip("transformers")
    wrapped = transformers.AutoModelForImageClassification.from_pretrained(run / "export")
    assert wrapped.config.id2label == dict(enumerate(NAMES))
    assert main(["export", str(run), "--output", str(tmp_path / "model.onnx")]) == 0
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    assert json.loads(session.get_modelmeta().custom_metadata_map["label_names"]) == list(NAMES)
    assert "| classes | 3: cat, dog &amp; co, owl/3 |" in model_card(run / "export", "me/small")
    page = (run / "report" / "index.html").read_text()
    assert "<summary>Classes</summary>" in page and '<th scope="row">1</th><td>dog &amp; co</td>' in page


def test_evaluate_checks_them(run, images, tmp_path, capsys):
    evaluate = ["evaluate", str(run), "--data", "", "--workers", "0", "--device", "cpu", "--test-split", "validation"]
    assert main([*evaluate, "--data-dir", str(images)]) == 0
    assert "note:" not in capsys.readouterr().out
    renamed = shutil.copytree(images, tmp_path / "renamed")
    for split in ("train", "validation"):
        (renamed / split / "cat").rename(renamed / split / "zebra")
    assert main([*evaluate, "--data-dir", str(renamed)]) == 2
    error = capsys.readouterr().err
    assert "data: expected the 3 classes of the network (cat, dog & co, owl|3), got 3 (dog & co, owl|3, zebra)" in error
    assert "class 0 is 'cat', in the data 'dog & co'" in error


def test_what_a_data_set_tells():
    assert class_names(Digits("val", lambda image: image)) == tuple("0123456789")
    assert class_names(Named("b", "a")) == ("b", "a")
    synonyms = Named("tench", "goldfish")
    synonyms.class_to_idx |= {"Tinca tinca": 0}
    assert class_names(synonyms) == ("tench", "goldfish")
    gap = Named("a", "b")
    gap.class_to_idx["b"] = 2
    assert class_names(gap) == () and class_names(Named()) == ()


def test_other_classes_take_the_place_of_those_before():
    model = named("a", "b", "c")
    assert set_label_names(model, Named("a", "b", "c")) == ""
    note = set_label_names(model, Named("x", "y", "z"))
    assert note == "the data's classes (x, y, z) take the place of those the network knew (a, b, c)"
    assert label_names(model) == ("x", "y", "z")
    assert set_label_names(model, Named("of", "another", "number", "four")) == "" and label_names(model)[0] == "x"
    shared = tiny_vit(num_classes=3).pretrained_cfg
    assert "label_names" not in shared, "timm's own configuration of the architecture stays as it is"


@pytest.mark.parametrize(
    ("found", "words"),
    [
        (("b", "a", "c"), "class 0 is 'a', in the data 'b'"),
        (("a", "b"), r"expected the 3 classes of the network \(a, b, c\), got 2 \(a, b\); evaluate"),
        (("a", "b", "c", "d", "e", "f"), r"got 6 \(a, b, c, d, e, f\); evaluate"),
    ],
)
def test_classes_of_others(found, words):
    with pytest.raises(ValueError, match=words):
        check_label_names(named("a", "b", "c"), Named(*found))


def test_where_no_name_is_shared_the_indices_count():
    note = check_label_names(named("n01440764", "n01443537"), Named("tench", "goldfish"))
    assert note.startswith("the data names its classes (tench, goldfish) otherwise than the network (n01440764,")
    assert check_label_names(tiny_vit(), Named("a")) == check_label_names(named("a", "b"), Named()) == ""


def test_folders_with_the_names_inside_load(tmp_path):
    """As an earlier version wrote them."""
    ofb.save(named("a", "b"), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["pretrained_cfg"]["label_names"] = config.pop("label_names")
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert label_names(ofb.load(tmp_path)) == ("a", "b")
    assert "| classes | 2: a, b |" in model_card(tmp_path, "me/small")


def test_a_card_of_many_classes_shows_some(tmp_path):
    ofb.save(named(*(f"c{i}" for i in range(30))), tmp_path)
    assert "30: c0, c1, " in model_card(tmp_path, "me/small")
    assert "c19, … (all in config.json: label_names)" in model_card(tmp_path, "me/small")
