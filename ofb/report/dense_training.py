"""How long the dense network of a search was trained, where that bears on the comparison with what was found."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ofb.engine.run_folder import METRICS_FILE
from ofb.report.run import Run

LAST_SHARE = 10  # a best epoch in the last tenth: more epochs might have found a better one


def dense_training(checkpoint: str | None, pretrained: bool) -> dict[str, int]:
    """Number of epochs, and the best one (from 1), of the training of the network that a search starts from.

    Both are 0 for random weights. Empty where nobody knows: weights of timm, and a network without its run.
    """
    if checkpoint is None:
        return {} if pretrained else {"epochs": 0, "best_epoch": 0}
    folder = Path(checkpoint).resolve()
    run = next((each for each in (folder, *list(folder.parents)[:2]) if (each / METRICS_FILE).is_file()), None)
    try:
        stages = {} if run is None else Run.read(run).stages
        trained = [name for name in stages if name != "search"]
        if not trained:
            return {}
        entries = stages[name if (name := f"finetune-{folder.name}") in trained else trained[-1]]
        best = max(entries, key=lambda entry: (entry["val_top1"], -entry["val_loss"]))
        return {"epochs": entries[-1]["epoch"] + 1, "best_epoch": best["epoch"] + 1}
    except (ValueError, LookupError, TypeError, OSError):  # damaged, of another run: the search need not care
        return {}


def dense_training_note(networks: Mapping[str, Mapping[str, Any]]) -> str:
    """What to know of the dense network before its accuracy is compared, or ""."""
    training = networks.get("dense", {}).get("training")
    if not training:
        return ""
    epochs, best = training["epochs"], training["best_epoch"]
    if not epochs:
        return "the dense network was never trained (random weights): all of the difference in accuracy is training"
    if best <= epochs - max(1, epochs // LAST_SHARE):
        return ""
    return (
        f"the dense network was still learning when its training ended (best epoch {best} of {epochs}): part of the "
        "difference is more training"
    )
