"""Which of timm's entry points search end to end: README's table; `python -m tests.test_entry_points` writes it."""

import re
import time
from collections import Counter
from pathlib import Path

import pytest
import timm
import torch

import ofb
from ofb.supernet.families import count_macs, family_of

ROOT = Path(__file__).parents[1]
MODULES = ("vision_transformer", "vision_transformer_hybrid", "deit", "eva", "swin_transformer", "swin_transformer_v2")
# The first pattern that fits a name gives its row; other names stand in the last row.
ROWS = {
    "DeiT, DeiT-III": "deit",
    "DINOv2": ".*dinov2",
    "DINOv3, LingBot": ".*(dinov3|lingbot)",
    "EVA, EVA02": "eva",
    "CLIP": ".*clip",
    "SigLIP, SigLIP 2": ".*siglip",
    "AIMv2": "aimv2",
    "BEiT-3": "beit3",
    "Perception Encoder": "vit_pe_",
    "RADIO, TIPSv2, InternViT": ".*(radio|tips|intern)",
    "Sapiens 2": ".*sapiens2",
    "ViT with rotary positions": ".*_rope_",
    "ViT on a convolutional stem": ".*(resnet|_r26_|_r50_|_mci_)|vit_(tiny|small|base|large)_r",
    "Swin": "swin_",
    "Swin V2": "swinv2_",
    "ViT, FlexiViT": "",
}
START, END = "<!-- entry points: written by tests/test_entry_points.py -->\n", "<!-- end of entry points -->\n"


def entry_points() -> dict[str, list[str]]:
    """Names in each row; what timm keeps for its own tests is left out."""
    rows = {row: [] for row in ROWS}
    for module in MODULES:
        for name in timm.list_models(module=module):
            if not name.startswith("test_"):
                rows[next(row for row, pattern in ROWS.items() if re.match(pattern, name))].append(name)
    return rows


def obstacle(name: str) -> str | None:
    """Why an entry point cannot be searched, None where it can: it is made at full size, without memory."""
    with torch.device("meta"):
        model = timm.create_model(name)
    support = ofb.supports(model)
    if not support:
        return re.sub(r"^cannot be searched: |blocks\.\d+(\.\w+)?: |timm\.models\.\w+\.", "", support.reason)
    submodules = family_of(model).submodules(model)
    parameters = dict(model.named_parameters())
    for submodule in submodules.values():
        heads, channels = submodule.candidates.full
        for coupling in submodule.couplings:
            units = heads if coupling.heads else coupling.repeats * heads * channels
            assert parameters[coupling.parameter].shape[coupling.dim] == units, (name, coupling)
    assert count_macs(model) > 0
    return None


def table() -> str:
    """The table in Markdown."""
    lines = ["| entry points | search end to end | not the others, because |", "|---|---|---|"]
    for row, names in entry_points().items():
        reasons = Counter(obstacle(name) for name in names)
        works = reasons.pop(None, 0)
        why = "; ".join(f"{reason} ({count})" for reason, count in sorted(reasons.items()))
        lines.append(f"| {row} | {works} of {len(names)} | {why} |")
    return "\n".join(lines) + "\n"


def readme_parts() -> tuple[str, str, str]:
    before, rest = (ROOT / "README.md").read_text().split(START)
    inside, after = rest.split(END)
    return before, inside, after


def test_readme_says_which_entry_points_work():
    pinned = re.search(r"^timm==(\S+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE)[1]
    if timm.__version__ != pinned:
        pytest.skip(f"the table is of timm {pinned}, this is {timm.__version__}")
    assert readme_parts()[1] == table(), "run `python -m tests.test_entry_points` to bring README's table up to date"


if __name__ == "__main__":
    before, _, after = readme_parts()
    start = time.perf_counter()
    (ROOT / "README.md").write_text(before + START + table() + END + after)
    print(f"written in {time.perf_counter() - start:.0f} s")
