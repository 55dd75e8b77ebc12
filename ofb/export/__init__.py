"""Networks for use elsewhere: saved folders that timm loads too, ONNX, torch programs, the Hugging Face hub."""

from ofb.export.card import model_card
from ofb.export.entry_point import ofb_network
from ofb.export.folder import ARCHITECTURE, WEIGHTS, load, save
from ofb.export.hub import push_to_hub
from ofb.export.programs import ONNX_FILE, PROGRAM_FILE, export_onnx, export_program
from ofb.export.sizes import count_params

__all__ = [
    "ARCHITECTURE",
    "ONNX_FILE",
    "PROGRAM_FILE",
    "WEIGHTS",
    "count_params",
    "export_onnx",
    "export_program",
    "load",
    "model_card",
    "ofb_network",
    "push_to_hub",
    "save",
]
