"""OFB: search, prune and fine-tune a Vision Transformer in one training run (CVPR 2024, arXiv 2403.15835)."""

from ofb.engine.config import SearchConfig, TrainConfig
from ofb.engine.distributed import process_group
from ofb.engine.search import search, search_targets
from ofb.engine.tool_config import EvaluateConfig, ExportConfig
from ofb.engine.train import evaluate, train
from ofb.export import export_onnx, export_program, load, push_to_hub, save
from ofb.hugging_face import from_transformers, to_transformers
from ofb.supernet import LatencyTable, SearchSpace, Supernet, adaptive_one_hot_loss, measure_latency
from ofb.supernet.families import Support, supports

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
