"""The examples run as they stand, on fewer steps, and print what they promise."""

import re
import runpy
import sys
from pathlib import Path

EXAMPLES = Path(__file__).parents[1] / "examples"


def run(name: str, *options: str, monkeypatch, capsys) -> str:
    """What an example prints."""
    monkeypatch.setattr(sys, "argv", [name, *options])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    return capsys.readouterr().out


def test_language_model(monkeypatch, capsys):
    shown = run("language_model.py", "--steps", "8", monkeypatch=monkeypatch, capsys=capsys)
    found = re.findall(r"(\S+)  widths +([\d ]+)  ([\d.]+) bits per character", shown)
    assert [name for name, *_ in found] == ["dense", "everywhere", "searched"]
    widths = [int(width) for width in found[-1][1].split()]
    assert sum(widths) <= 0.375 * 4 * 256 and all(width % 32 == 0 for width in widths)
    assert all(2 < float(bits) < 6.5 for *_, bits in found), "6.7 bits would be guessing"


def test_cut_computes_what_the_mask_computed():
    """Units of mask 0 are cut without a difference."""
    import torch

    mlp = runpy.run_path(str(EXAMPLES / "language_model.py"))["SearchedMlp"](256)
    mlp.lam = 0.0
    with torch.no_grad():
        mlp.alpha.fill_(-torch.inf)[2] = 0.0  # 96 units
    x = torch.randn(5, 64)
    expected = mlp(x)
    mlp.cut(96)
    assert mlp.fc1.out_features == 256 and mlp.fc1.weight.shape == (96, 64)
    torch.testing.assert_close(mlp(x), expected)


def test_own_loop(monkeypatch, capsys):
    shown = run("own_loop.py", "--epochs", "2", monkeypatch=monkeypatch, capsys=capsys)
    dense, found = (int(params.replace(",", "")) for params in re.findall(r"parameters ([\d,]+)", shown))
    assert found < 0.6 * dense


def test_accelerate_loop(monkeypatch, capsys):
    options = ("--epochs", "2", "--mixed-precision", "bf16")
    shown = run("accelerate_loop.py", *options, monkeypatch=monkeypatch, capsys=capsys)
    hidden = [int(size) for size in re.search(r"hidden channels \[([\d, ]+)\]", shown)[1].split(",")]
    assert len(hidden) == 3 and min(hidden) >= 64 and sum(hidden) < 3 * 256
    assert "the same network in 1 process(es): True" in shown


def test_quantize(monkeypatch, capsys):
    shown = run("quantize.py", "--epochs", "3", monkeypatch=monkeypatch, capsys=capsys)
    top1 = [float(share) for share in re.findall(r"top-1 ([\d.]+)%", shown)]
    size = [int(kilobytes) for kilobytes in re.findall(r"(\d+) KB", shown)]
    assert abs(top1[0] - top1[1]) <= 2 and size[1] < 0.5 * size[0]
    assert float(re.search(r"largest difference of a logit: ([\d.]+)%", shown)[1]) < 3


def test_notebook_runs_top_to_bottom(tmp_path, monkeypatch):
    import nbformat
    from nbclient import NotebookClient

    monkeypatch.setenv("PYTHONPATH", str(EXAMPLES.parent))
    notebook = nbformat.read(EXAMPLES / "search.ipynb", as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not any(cell.outputs for cell in code), "outputs are made, not kept"
    code[0].source = code[0].source.replace("epochs = 15", "epochs = 2")
    NotebookClient(notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": tmp_path}}).execute()
    outputs = [output for cell in code for output in cell.outputs]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert any("block 2: " in output.get("text", "") for output in outputs)
