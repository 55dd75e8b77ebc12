"""OFB: search, prune and fine-tune a Vision Transformer in one training run (CVPR 2024, arXiv 2403.15835)."""

import importlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ofb.engine.config import SearchConfig, TrainConfig
    from ofb.engine.distributed import process_group
    from ofb.engine.search import search, search_targets
    from ofb.engine.tool_config import EvaluateConfig, ExportConfig
    from ofb.engine.train import evaluate, train
    from ofb.export import export_onnx, export_program, load, push_to_hub, save
    from ofb.hugging_face import from_transformers, to_transformers
    from ofb.supernet import LatencyTable, SearchSpace, Supernet, adaptive_one_hot_loss, measure_latency
    from ofb.supernet.families import Support, supports

# Where each public name lives. It is imported when it is first used: the command line prints its help without torch.
_HOME = {
    "EvaluateConfig": "engine.tool_config",
    "ExportConfig": "engine.tool_config",
    "LatencyTable": "supernet",
    "SearchConfig": "engine.config",
    "SearchSpace": "supernet",
    "Supernet": "supernet",
    "Support": "supernet.families",
    "TrainConfig": "engine.config",
    "adaptive_one_hot_loss": "supernet",
    "evaluate": "engine.train",
    "export_onnx": "export",
    "export_program": "export",
    "from_transformers": "hugging_face",
    "load": "export",
    "measure_latency": "supernet",
    "process_group": "engine.distributed",
    "push_to_hub": "export",
    "save": "export",
    "search": "engine.search",
    "search_targets": "engine.search",
    "supports": "supernet.families",
    "to_transformers": "hugging_face",
    "train": "engine.train",
}
_PARTS = ("engine", "export", "hugging_face", "supernet")

__all__ = [
    "EvaluateConfig",
    "ExportConfig",
    "LatencyTable",
    "SearchConfig",
    "SearchSpace",
    "Supernet",
    "Support",
    "TrainConfig",
    "adaptive_one_hot_loss",
    "evaluate",
    "export_onnx",
    "export_program",
    "from_transformers",
    "load",
    "measure_latency",
    "process_group",
    "push_to_hub",
    "save",
    "search",
    "search_targets",
    "supports",
    "to_transformers",
    "train",
]


def __getattr__(name: str) -> Any:
    if name in _PARTS:
        return importlib.import_module(f"ofb.{name}")
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"ofb.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


if sys.argv[:1] != ["-m"] and [Path(argument).stem for argument in sys.argv[:1]] != ["ofb"]:  # but in `ofb COMMAND`
    importlib.import_module("ofb.export.entry_point")  # tells timm of the architecture
