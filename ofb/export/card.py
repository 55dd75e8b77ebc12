"""A model card: what a saved network is, how large, how good, and how to load it, from its folder and its run's."""

from html import escape
from pathlib import Path
from typing import Any

from ofb.engine.run_folder import CONFIG_FILE, FIGURES_FILE, run_of
from ofb.engine.untrusted import parse_json, parse_yaml
from ofb.export.entry_point import NAME
from ofb.export.folder import ARCHITECTURE
from ofb.supernet.cost import readable

MOST_NAMES = 20  # of classes
# Options of a run that its card tells. Names of folders and files stay private.
TOLD = ("model", "data", "epochs", "finetune_epochs", "opt", "batch_size", "seed")
FRONT_MATTER = """---
library_name: timm
pipeline_tag: image-classification
tags:
- image-classification
- timm
- ofb
- pruning
---"""
CITATION = """@inproceedings{ye2024once,
  title     = {Once for Both: Single Stage of Importance and Sparsity Search for Vision Transformer Compression},
  author    = {Ye, Hancheng and Yu, Chong and Ye, Peng and Xia, Renqiu and Tang, Yansong and Lu, Jiwen and Chen, Tao
               and Zhang, Bo},
  booktitle = {CVPR},
  year      = {2024}
}"""


def model_card(folder: str | Path, repository: str) -> str:
    """README.md of a saved network on the Hugging Face hub.

    Args:
        folder: of the saved network; where it lies in a run folder, the card tells of the run as well.
        repository: USER/NAME.

    Raises:
        FileNotFoundError: the folder holds no saved network.
        ValueError: an earlier version saved the network, in a form that timm does not load; or a file is damaged.
    """
    folder = Path(folder)
    try:
        return _card(folder, repository)
    except (LookupError, TypeError, AttributeError, ArithmeticError) as error:
        raise ValueError(f"folder: {folder} or its run has files that this package did not write: {error!r}") from error


def _card(folder: Path, repository: str) -> str:
    config = parse_json((folder / ARCHITECTURE).read_text())
    if config["architecture"] != NAME:
        raise ValueError(f"folder: expected a network in timm's form, got an earlier one in {folder}: load and save it")
    options, figures = _run(folder)
    parts = (
        FRONT_MATTER,
        f"# {repository.rpartition('/')[2]}",
        _summary(options),
        _figures_table(config, figures),
        f"## Sizes\n\n{_sizes(config['model_args']['network'])}",
        f"## How to load it\n\n{_usage(repository)}",
        "" if not options else "## How it was made\n\n" + "\n".join(_told(options)),
        f"## Citation\n\n```bibtex\n{CITATION}\n```",
    )
    return "\n\n".join(part for part in parts if part) + "\n"


def _run(folder: Path) -> tuple[dict[str, Any], dict[str, dict[str, float]]]:
    """Options of the run the network comes from, and figures of the dense network and this one; empty if unknown."""
    run = run_of(folder)
    if run is None:
        return {}, {}
    options, figures = parse_yaml((run / CONFIG_FILE).read_text()), {}
    if (run / FIGURES_FILE).is_file():
        found = parse_json((run / FIGURES_FILE).read_text())
        this = next((name for name in (folder.name, "compressed", "trained") if name in found), None)
        figures = {"dense": found.get("dense", {}), "this": found.get(this, {})}
    return options, figures


def _summary(options: dict[str, Any]) -> str:
    found = "A plain, dense Vision Transformer whose blocks have sizes of their own"
    if "target" not in options:
        return f"{found}."
    start = f"`{_plain(options['model'])}`" if options.get("checkpoint") is None else "a trained network"
    targets = options.get("targets")
    target = f"targets {_plain(targets)}" if targets else f"target {_plain(options['target'])}"
    return (
        f"{found}, found inside {start} by one search ({target}) with OFB, "
        "[Once for Both](https://arxiv.org/abs/2403.15835)."
    )


def _figures_table(config: dict[str, Any], figures: dict[str, dict[str, float]]) -> str:
    this, dense = figures.get("this", {}), figures.get("dense", {})
    mean, std = (", ".join(f"{v:.3g}" for v in config["pretrained_cfg"][key]) for key in ("mean", "std"))
    rows = [("", "this network", "dense")]
    if "top1" in this:
        rows.append(("top-1 on the test images", *(f"{f['top1']:.2f} %" if "top1" in f else "" for f in (this, dense))))
    for name, key in (("multiply-accumulates of an image", "macs"), ("parameters", "params")):
        rows.append((name, readable(config[key]), readable(dense[key]) if key in dense else ""))
    size = " × ".join(map(str, config["pretrained_cfg"]["input_size"]))
    rows += [("images", f"{size}, mean {mean}, std {std}", ""), ("classes", _classes(config), "")]
    return _table(rows if dense and this != dense else [row[:2] for row in rows])


def _classes(config: dict[str, Any]) -> str:
    """How many, and their names."""
    names = config.get("label_names") or config["pretrained_cfg"].get("label_names") or ()
    if len(names) != config["num_classes"]:
        return str(config["num_classes"])
    rest = f", … (all in {ARCHITECTURE}: label_names)" if len(names) > MOST_NAMES else ""
    return f"{len(names)}: {', '.join(map(_plain, names[:MOST_NAMES]))}{rest}"


def _sizes(network: dict[str, Any]) -> str:
    rows = [("block", "residual width", "heads × channels", "hidden channels")]
    stages = network.get("stages") or [network]
    for s, stage in enumerate(stages):
        for b, block in enumerate(stage["blocks"]):
            name = f"{s}.{b}" if len(stages) > 1 else str(b)
            heads = f"{block['heads']} × {block['head_dim']}"
            rows.append((name, str(stage["embed_dim"]), heads, str(block["hidden"])))
    kept = network.get("kept_patches")
    return _table(rows) + ("" if kept is None else f"\n\nIt looks at {kept} positions of the image.")


def _usage(repository: str) -> str:
    return f"""```sh
pip install ofb-kernels
```

```python
import ofb  # tells timm of the architecture
import timm

model = timm.create_model("hf-hub:{repository}", pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
logits = model(transform(image).unsqueeze(0))
```"""


def _told(options: dict[str, Any]) -> list[str]:
    known = {key: options[key] for key in TOLD if options.get(key) is not None}
    if known.get("data") == "":
        known["data"] = "an image folder"
    if options.get("checkpoint") is not None:  # then it is not the named model that the run started from
        known.pop("model", None)
    return [f"- {key}: {_plain(value)}" for key, value in known.items()]


def _plain(value: object) -> str:
    """A value in one line that is neither HTML nor code nor the end of a cell."""
    return escape(" ".join(str(value).split()).replace("`", "'").replace("|", "/"), quote=False)


def _table(rows: list[tuple[str, ...]]) -> str:
    head, *body = ("| " + " | ".join(row) + " |" for row in rows)
    return "\n".join([head, "|" + "---|" * len(rows[0]), *body])
