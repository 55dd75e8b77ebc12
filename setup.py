import re
from pathlib import Path

from setuptools import find_packages, setup

CLI = ["tyro>=0.9", "rich>=13", "tensorboard>=2.15", "matplotlib>=3.8", "scikit-learn>=1.3", "pyyaml>=6"]
EXPORT = ["onnx>=1.16", "onnxruntime>=1.17", "onnxscript>=0.3"]
TRANSFORMERS = ["transformers>=5.9"]
WANDB = ["wandb>=0.18"]
BENCHMARK = ["torch-pruning>=1.6"]
EXAMPLES = ["accelerate>=1", "torchao>=0.15", "nbclient>=0.10", "nbformat>=5.10", "ipykernel>=6.29"]
TEST = ["pytest>=8", "pytest-xdist>=3.5", "hypothesis>=6.100", "ruff>=0.9", "mypy>=1.13", "setuptools>=77"]
TEST += ["webdataset>=0.2", "selenium>=4.20"]


def readme() -> str:
    """README.md as a package index shows it: without pictures and links into the repository."""
    text = Path(__file__).with_name("README.md").read_text(encoding="utf-8")
    text = re.sub(r"!\[[^]]*\]\((?!https?:)[^)]*\)\n*", "", text)
    return re.sub(r"\[([^]]*)\]\((?!https?:|#)[^)]*\)", r"\1", text)


setup(
    name="ofb-kernels",
    version="0.1.0",
    description="Once-for-both compression of vision transformers, on fused bi-mask kernels",
    author="OFB Kernels authors",
    long_description=readme(),
    long_description_content_type="text/markdown",
    license="MIT",
    license_files=["LICENSE"],
    project_urls={"Paper": "https://arxiv.org/abs/2403.15835"},
    classifiers=[
        "Intended Audience :: Science/Research",
        "Operating System :: OS Independent",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
    packages=find_packages(include=["ofb", "ofb.*", "ofb_kernels", "ofb_kernels.*"]),
    package_data={"ofb": ["py.typed"], "ofb.report": ["page.css"], "ofb_kernels": ["measured.json", "py.typed"]},
    python_requires=">=3.10",
    install_requires=[
        "torch>=2.6",
        "triton>=3.2; platform_system == 'Linux'",
        "timm>=1.0.23",
        "numpy>=1.26",
        "safetensors>=0.4",
        "filelock>=3.14",
    ],
    extras_require={
        "cli": CLI,
        "export": EXPORT,
        "transformers": TRANSFORMERS,
        "wandb": WANDB,
        "benchmark": BENCHMARK,
        "examples": CLI + EXAMPLES,
        "test": TEST + CLI + EXPORT + TRANSFORMERS + WANDB + BENCHMARK + EXAMPLES,
    },
    entry_points={"console_scripts": ["ofb = ofb.cli:main"]},
)
