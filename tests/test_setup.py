"""Both packages import with what they require, and with nothing more."""

import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from ofb.engine.extras import EXTRAS

ROOT = Path(__file__).parents[1]

CLI = ["tyro", "rich", "tensorboard", "matplotlib", "sklearn", "yaml"]
EXAMPLES = ["accelerate", "torchao", "nbclient", "nbformat", "ipykernel"]
OPTIONAL = [*CLI, "onnx", "onnxruntime", "onnxscript", "transformers", "wandb", *EXAMPLES]


def run_without(blocked: list[str], code: str) -> None:
    blocking = f"import sys\nfor name in {blocked!r}: sys.modules[name] = None\n"
    done = subprocess.run([sys.executable, "-c", blocking + code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_ofb_needs_no_extra():
    # timm reads its own configuration with yaml, so that one is checked by name only
    run_without([name for name in OPTIONAL if name != "yaml"], "import ofb, ofb.cli, ofb.export, ofb.report")


def test_ofb_kernels_needs_torch_alone():
    run_without([*OPTIONAL, "timm", "torchvision", "numpy.testing"], "import ofb_kernels, ofb_kernels.nn")


def test_ofb_kernels_without_triton_is_eager():
    run_without(
        ["triton"],
        "import torch, ofb_kernels\n"
        "x = ofb_kernels.masked_linear(torch.randn(2, 3), torch.randn(4, 3), None, torch.rand(4))\n"
        "assert x.shape == (2, 4)",
    )


@pytest.mark.parametrize("package", ["ofb_kernels"])
def test_arrows_point_down(package):
    run_without(["ofb"], f"import {package}, {package}.nn, {package}.testing, {package}.kernels.masked_mlp")


def test_wheel_holds_both_packages_and_their_data(tmp_path):
    for name in ("setup.py", "README.md", "LICENSE", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    for package in ("ofb", "ofb_kernels"):
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "."]
    subprocess.run(command, check=True, cwd=tmp_path)
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    sources = {path.relative_to(ROOT).as_posix() for path in ROOT.glob("ofb*/**/*.py")}
    data = {"ofb/py.typed", "ofb_kernels/py.typed", "ofb_kernels/measured.json"}
    assert sources | data <= names
    assert all(name.split("/")[0] in ("ofb", "ofb_kernels") or ".dist-info/" in name for name in names)
    with zipfile.ZipFile(wheel) as archive:
        (metadata,) = (archive.read(name).decode() for name in names if name.endswith("/METADATA"))
    assert "Project-URL: Paper, https://" in metadata and "## Install" in metadata
    links = re.findall(r"\]\(([^)]*)\)", metadata.partition("\n\n")[2])
    assert links and all(link.startswith(("http", "#")) for link in links), "nothing else leads anywhere from an index"


@pytest.mark.parametrize(
    ("missing", "command", "extra"),
    [
        ("tyro", "completion bash", "cli"),
        ("matplotlib", "search --data-dir nowhere", "cli"),
        ("matplotlib", "report nowhere", "cli"),
        ("sklearn", "train --epochs 1", "cli"),
        ("onnxscript", "export nowhere", "export"),
    ],
)
def test_what_is_missing_is_told_before_anything_is_done(missing, command, extra, tmp_path):
    code = f"from ofb.cli import main\nassert main({command.split()!r}) == 2"
    blocking = f"import sys, os\nos.chdir({str(tmp_path)!r})\nsys.modules[{missing!r}] = None\n"
    done = subprocess.run([sys.executable, "-c", blocking + code], capture_output=True, text=True)
    expected = f'ofb: expected {missing} to be installed, got no such module; pip install "ofb-kernels[{extra}]"\n'
    assert done.returncode == 0 and done.stderr == expected, done.stderr
    assert not list(tmp_path.iterdir())


def test_every_extra_module_is_one_of_setup():
    """setup.py is the list; names of modules are not always those of packages."""
    packages = {"yaml": "pyyaml", "sklearn": "scikit-learn"}
    listed = (ROOT / "setup.py").read_text()
    for module, extra in EXTRAS.items():
        line = next(line for line in listed.splitlines() if line.startswith(f"{extra.upper()} = "))
        assert f'"{packages.get(module, module)}>=' in line
