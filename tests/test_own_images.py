"""The first hour of a user: 2,240 image files of every kind, every option but sizes and epochs left at its default."""

import json
import random
import re
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

import ofb
from ofb.cli import main

CLASSES = ("anchor", "bridge", "castle", "dragon", "eagle", "falcon", "garden", "harbour")  # each one its first letter
TRAIN, VALIDATION = 260, 20  # images of a class
FONTS = ("DejaVuSans*", "DejaVuSerif*", "cmr10", "cmss10", "cmtt10", "STIXGeneral*")
KINDS = [("RGB", "jpg"), ("RGB", "png"), ("L", "jpg"), ("L", "png"), ("RGBA", "png"), ("P", "png"), ("LA", "png")]
KINDS += [("RGB", "webp"), ("CMYK", "jpg"), ("1", "png"), ("I;16", "png")]
MODEL = "--model vit_tiny_patch16_224 --model-kwargs img_size=32 patch_size=8 embed_dim=48 depth=2 num_heads=3"
SIZES = "--batch-size 256 --epochs 3"


def fonts() -> list[Path]:
    folder = Path(matplotlib.get_data_path()) / "fonts/ttf"
    return sorted(path for pattern in FONTS for path in folder.glob(f"{pattern}.ttf") if "Display" not in path.name)


def draw(letter: str, chosen: random.Random, typefaces: list[Path]) -> Image.Image:
    """A letter on a ground of two colours, anywhere, in any typeface, as wide as high or not."""
    width, height = chosen.randint(24, 96), chosen.randint(24, 96)
    colours = [tuple(chosen.randrange(256) for _ in range(3)) for _ in range(3)]
    image = Image.new("RGB", (width, height), colours[0])
    pen = ImageDraw.Draw(image)
    pen.rectangle((chosen.randrange(width), chosen.randrange(height), width, height), fill=colours[1])
    size = max(10, int(min(width, height) * chosen.uniform(0.6, 0.95)))
    font = ImageFont.truetype(chosen.choice(typefaces), size)
    pen.text((width / 2, height / 2), letter, fill=colours[2], font=font, anchor="mm")
    return image


def write(image: Image.Image, path: Path, kind: tuple[str, str], turned: int) -> None:
    """A file of a mode and format; JPEG with an EXIF orientation."""
    mode, suffix = kind
    if mode == "I;16":
        image = Image.fromarray(np.asarray(image.convert("L"), dtype=np.uint16) * 257)
    else:
        image = image.convert(mode)
    exif = Image.Exif()
    exif[0x0112] = turned
    image.save(path.with_suffix(f".{suffix}"), **({"exif": exif} if suffix == "jpg" else {}))


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """train/ and val/, a folder for each class."""
    folder, typefaces, chosen = tmp_path_factory.mktemp("data") / "letters", fonts(), random.Random(0)
    for split, count in (("train", TRAIN), ("val", VALIDATION)):
        for name in CLASSES:
            place = folder / split / name
            place.mkdir(parents=True)
            for i in range(count):
                image = draw(name[0].upper(), chosen, typefaces)
                write(image, place / f"{name} {i:03}", KINDS[i % len(KINDS)], turned=1 + i % 8)
    return folder


@pytest.fixture(scope="module")
def runs(images, tmp_path_factory) -> Path:
    """A dense training and a search, as README has them."""
    runs = tmp_path_factory.mktemp("runs")
    data = f"--data-dir {images}"
    assert main(f"train {MODEL} {data} {SIZES} --output {runs / 'dense'}".split()) == 0
    search = f"search --checkpoint {runs / 'dense'} {data} {SIZES} --finetune-epochs 2 --output {runs / 'found'}"
    assert main(search.split()) == 0
    return runs


def test_the_files_are_what_users_have(images):
    files = [path for path in images.rglob("*") if path.is_file()]
    assert len(files) == len(CLASSES) * (TRAIN + VALIDATION) > 2000
    opened = [Image.open(path) for path in files]
    assert {image.mode for image in opened} >= {"RGB", "L", "RGBA", "P", "LA", "CMYK", "1"}
    assert len({image.size for image in opened}) > 1000
    assert {image.getexif().get(0x0112) for image in opened} >= set(range(1, 9))


@pytest.mark.parametrize("name", ["dense", "found"])
def test_what_evaluate_says_is_what_the_run_found(runs, name, capsys):
    """Without an option: the run's own images, normalization and classes."""
    figures = json.loads((runs / name / "figures.json").read_text())
    expected = figures["trained" if name == "dense" else "compressed"]
    assert main(["evaluate", str(runs / name)]) == 0
    shown = capsys.readouterr().out
    assert f"top-1 {expected['top1']:.2f} %" in shown
    assert 0 <= expected["top1"] <= 100


def test_the_target_is_met(runs):
    figures = json.loads((runs / "found" / "figures.json").read_text())
    assert 0.48 <= figures["compressed"]["macs"] / figures["dense"]["macs"] <= 0.5


def test_classes_have_their_names(runs):
    for name in ("dense", "found"):
        assert json.loads((runs / name / "export" / "config.json").read_text())["label_names"] == list(CLASSES)


def test_export(runs, capsys):
    pytest.importorskip("onnxruntime")
    assert main(["export", str(runs / "found")]) == 0
    (difference,) = re.findall(r"logits within (\S+) of the network's", capsys.readouterr().out)
    assert float(difference) <= 1e-4 and (runs / "found" / "export" / "model.onnx").stat().st_size > 10_000


def test_report(runs, capsys):
    assert main(["report", str(runs / "found")]) == 0
    page = Path(capsys.readouterr().out.split()[0])
    assert page == runs / "found" / "report" / "index.html" and all(name in page.read_text() for name in CLASSES)


def test_profile(runs, capsys):
    assert main(["profile", str(runs / "found")]) == 0
    assert "compressed" in capsys.readouterr().out


def test_the_network_loads_elsewhere(runs):
    import timm

    network = timm.create_model(f"local-dir:{runs / 'found' / 'export'}", pretrained=True)
    loaded = ofb.load(runs / "found" / "export")
    assert all((a == b).all() for a, b in zip(network.parameters(), loaded.parameters(), strict=True))
