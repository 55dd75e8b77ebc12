"""Which code wrote a checkpoint."""

import hashlib
from functools import cache
from pathlib import Path

import timm
import torch

import ofb_kernels

PACKAGES = (Path(__file__).parents[1], Path(ofb_kernels.__file__).parent)


@cache
def code_versions() -> dict[str, str]:
    """Versions of what a run computes with; this project's is the digest of its source files."""
    digest = hashlib.sha256()
    for package in PACKAGES:
        for path in sorted(package.rglob("*.py")):
            digest.update(str(path.relative_to(package)).encode() + path.read_bytes())
    return {"ofb": digest.hexdigest()[:12], "torch": torch.__version__, "timm": timm.__version__}
