"""Every code block of README and docs runs: Python as it stands, commands on the digits shortened, the others parsed.

What would be downloaded is replaced: pretrained weights by random ones.
"""

import re
import shlex
from importlib.util import find_spec
from pathlib import Path

import pytest
import timm
import torch

import ofb
from ofb.cli import main, parse

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SHORT = {"train": "--epochs 2 --device cpu", "search": "--epochs 2 --finetune-epochs 1 --device cpu"}
SHORT |= {"evaluate": "--device cpu", "profile": "--device cpu", "export": ""}
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
OTHERS = ("git", "pip", "cd", "docker", "eval")  # commands that are not this project's


def blocks(page: Path, language: str) -> list[str]:
    return [text for found, text in BLOCK.findall(page.read_text()) if found == language]


def commands(page: Path) -> list[list[str]]:
    """The words of each command line, without comments, variables in front, and "…"."""
    lines = "\n".join(blocks(page, "sh")).replace("\\\n", " ").splitlines()
    found = [[word for word in shlex.split(line, comments=True) if word != "…"] for line in lines]
    return [words[next(i for i, word in enumerate(words) if "=" not in word) :] for words in found if words]


def test_blocks_are_of_known_kinds():
    for page in PAGES:
        kinds = {kind for kind, _ in BLOCK.findall(page.read_text())}
        assert kinds <= {"python", "sh", "bibtex", ""}, page.name


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=lambda page: page.name)
def test_python_runs(page, tmp_path, monkeypatch):
    transformers = pytest.importorskip("transformers") if "transformers." in page.read_text() else None
    monkeypatch.chdir(tmp_path)
    without_download(monkeypatch, transformers)
    images, targets = torch.randn(2, 3, 224, 224), torch.randint(0, 1000, (2,))
    names = {"torch": torch, "timm": timm, "ofb": ofb, "transformers": transformers, "loader": [(images, targets)]}
    for block in blocks(page, "python"):
        exec(compile(block, page.name, "exec"), names)


def without_download(monkeypatch, transformers) -> None:
    create = timm.create_model

    def create_model(name, pretrained=False, **options):
        saved = name.replace("hf-hub:USER/NAME", "local-dir:compressed")
        return create(saved, pretrained=saved.startswith("local-dir:"), **options)

    monkeypatch.setattr(timm, "create_model", create_model)
    if transformers is not None:
        sizes = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64)
        made = {
            "AutoModelForImageClassification": transformers.ViTForImageClassification(
                transformers.ViTConfig(**sizes, image_size=32)
            ),
            "AutoImageProcessor": transformers.ViTImageProcessor(size={"height": 32, "width": 32}),
        }
        for name, each in made.items():
            monkeypatch.setattr(getattr(transformers, name), "from_pretrained", lambda _, made=each: made)


def test_the_first_search_runs_as_it_stands(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first = [words for words in commands(ROOT / "docs" / "README.md") if words[0] == "ofb"]
    assert [words[1] for words in first] == ["train", "search", "evaluate", "profile", "export"]
    for _, command, *arguments in first:
        assert main([command, *arguments, *SHORT[command].split()]) == 0
    assert (tmp_path / "runs/first/export/model.onnx").exists()


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "sh")], ids=lambda page: page.name)
def test_commands_exist_with_these_options(page):
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for words in commands(page):
        if words[0] in ("ofb", "torchrun"):
            command, *arguments = words[words.index("ofb") + 1 :]
            if "--resume" not in arguments:  # takes its options from the run
                parse(command, arguments)
        elif words[0] == "make":
            assert targets.issuperset(word for word in words[1:] if "=" not in word), words
        elif words[0] == "python":
            assert words[1:2] != ["-m"] or find_spec(words[2]), words
        else:
            assert words[0] in OTHERS, words


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)", page.read_text()):
        assert target.startswith("https://") or (page.parent / target).exists(), target
