"""Draws the pictures of docs/method.md: python docs/pictures.py"""

from pathlib import Path

import matplotlib
import torch

from ofb import adaptive_one_hot_loss
from ofb.supernet.schedules import ramp
from ofb_kernels import bimask

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

FOLDER = Path(__file__).with_name("pictures")
COUNTS = (16, 24, 32, 40, 48, 56, 64)


def main() -> None:
    plt.rcParams.update(
        {"font.size": 9, "axes.titlesize": 9, "axes.spines.top": False, "axes.spines.right": False, "savefig.dpi": 130}
    )
    FOLDER.mkdir(exist_ok=True)
    for name, draw in {"bimask": draw_bimask, "schedules": draw_schedules, "one_hot": draw_one_hot}.items():
        figure = draw()
        figure.savefig(FOLDER / f"{name}.png", bbox_inches="tight")
        plt.close(figure)


def draw_bimask() -> plt.Figure:
    """Importance, sparsity and their mixture over the units' ranks, early, half way and late in a search."""
    torch.manual_seed(0)
    score = torch.randn(64).sort(descending=True).values
    stages = {
        "early: all sizes likely, λ = 0.9": (torch.zeros(7), 0.9),
        "later: 24 to 40 likely, λ = 0.4": (torch.tensor([-1.0, 2.0, 3.0, 2.0, 0.0, -2.0, -3.0]), 0.4),
        "late: 32 it is, λ = 0.1": (torch.tensor([-4.0, 0.0, 6.0, 0.0, -4.0, -4.0, -4.0]), 0.1),
    }
    figure, axes = plt.subplots(1, 3, figsize=(9, 2.6), sharey=True)
    for axis, (title, (alpha, lam)) in zip(axes, stages.items(), strict=True):
        curves = {
            "S, importance": (bimask(score, alpha, list(COUNTS), 1.0), "tab:orange", 1.2),
            "V, sparsity": (bimask(score, alpha, list(COUNTS), 0.0), "tab:blue", 1.2),
            "m = λ S + (1 − λ) V": (bimask(score, alpha, list(COUNTS), lam), "black", 2.0),
        }
        for label, (values, color, width) in curves.items():
            axis.step(range(64), values, where="post", label=label, color=color, linewidth=width)
        axis.set(title=title, xlabel="rank of the unit", ylim=(-0.03, 1.05))
    axes[0].legend(frameon=False, fontsize=8, loc="lower left")
    return figure


def draw_schedules() -> plt.Figure:
    """λ and γ over the paper's 100 epochs."""
    epochs = range(101)
    figure, axis = plt.subplots(figsize=(4.6, 2.4))
    axis.plot(epochs, [ramp(epoch, 20, 0.99, 0.1) for epoch in epochs], color="tab:orange", label="λ, share of S")
    axis.plot(epochs, [ramp(epoch, 20, 0.05, 0.25) for epoch in epochs], color="tab:blue", label="γ, masked patches")
    axis.set(xlabel="epoch", ylim=(0, 1.02))
    axis.legend(frameon=False)
    return figure


def draw_one_hot() -> plt.Figure:
    """The adaptive one-hot loss of two candidates, and of seven of which one is ahead."""
    logits = torch.linspace(-6, 6, 241)
    figure, axis = plt.subplots(figsize=(4.6, 2.4))
    for others, color in ((1, "tab:blue"), (6, "tab:orange")):
        alphas = torch.cat([logits[:, None], torch.zeros(len(logits), others)], 1)
        losses = [adaptive_one_hot_loss(alpha).item() for alpha in alphas]
        axis.plot(alphas.softmax(1)[:, 0], losses, color=color, label=f"{others + 1} candidates")
    axis.set(xlabel="probability of the first candidate, the others alike", ylabel="loss", ylim=(-12, 30))
    axis.legend(frameon=False)
    return figure


if __name__ == "__main__":
    main()
