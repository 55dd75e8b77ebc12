"""How wide does each MLP of a language model have to be? The ops of ofb_kernels in a network of your own.

A small character model reads the documentation that ships with Python. Each block's MLP gets a bi-mask: a score for
each hidden unit (which ones), and a logit for each candidate width (how many). Both are learned with the weights, while
a loss brings the expected width to the budget. Then the masks are folded into the weights and the rest is cut off.

    python examples/language_model.py                # three minutes on one CPU core

With so little training the network found is about as good as one of the same width everywhere (2.203 and 2.194 bits per
character, the dense one 2.116; one seed).
"""

import math
from itertools import product
from pydoc_data.topics import topics

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor, nn

from ofb import adaptive_one_hot_loss
from ofb_kernels import bimask, masked_mlp

DIM, DEPTH, HEADS, HIDDEN, CONTEXT, BATCH = 64, 4, 4, 256, 64, 32
WIDTHS = range(HIDDEN // 8, HIDDEN + 1, HIDDEN // 8)  # candidates


class SearchedMlp(nn.Module):
    """fc2(gelu(fc1(x) ⊙ mask)); after `cut`, a plain MLP."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(DIM, hidden), nn.Linear(hidden, DIM)
        self.score = nn.Parameter(4 + 0.2 * torch.randn(hidden))  # importance starts near 1 ...
        self.alpha = nn.Parameter(torch.linspace(-4, 0, len(WIDTHS)))  # ... and so does the largest width
        self.lam = None  # share of importance in the mask while the width is searched

    def mask(self) -> Tensor:
        return bimask(self.score, self.alpha, list(WIDTHS), self.lam)

    def expected_width(self) -> Tensor:
        return self.alpha.softmax(0) @ torch.tensor(WIDTHS, dtype=torch.float32)

    def forward(self, x: Tensor) -> Tensor:
        if self.lam is None:
            return self.fc2(F.gelu(self.fc1(x)))
        return masked_mlp(x, self.fc1.weight, self.fc1.bias, self.mask(), self.fc2.weight, self.fc2.bias)

    @torch.no_grad()
    def cut(self, width: int) -> None:
        """Keep the most important units, the mask folded into fc1."""
        kept, mask = self.score.argsort(descending=True)[:width], self.mask()
        for parameter in (self.fc1.weight, self.fc1.bias):
            parameter.data = (parameter * mask.view(-1, *[1] * (parameter.dim() - 1)))[kept]
        self.fc2.weight.data = self.fc2.weight[:, kept]
        self.lam = None


class Block(nn.Module):
    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(DIM), nn.LayerNorm(DIM)
        self.qkv, self.proj, self.mlp = nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, DIM), SearchedMlp(hidden)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.proj(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


class CharacterModel(nn.Module):
    def __init__(self, characters: int, hidden: int) -> None:
        super().__init__()
        self.embed, self.position = nn.Embedding(characters, DIM), nn.Parameter(0.02 * torch.randn(CONTEXT, DIM))
        self.blocks = nn.Sequential(*(Block(hidden) for _ in range(DEPTH)))
        self.norm, self.head = nn.LayerNorm(DIM), nn.Linear(DIM, characters)

    def forward(self, characters: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.embed(characters) + self.position)))

    def mlps(self) -> list[SearchedMlp]:
        return [block.mlp for block in self.blocks]


def batch(text: Tensor) -> tuple[Tensor, Tensor]:
    starts = torch.randint(len(text) - CONTEXT, (BATCH, 1)) + torch.arange(CONTEXT)
    return text[starts], text[starts + 1]


def loss_of(model: nn.Module, text: Tensor) -> Tensor:
    characters, following = batch(text)
    return F.cross_entropy(model(characters).flatten(0, 1), following.flatten())


def train(model: CharacterModel, text: Tensor, steps: int, budget: float | None = None) -> None:
    """Train, and with a budget search: the share of all hidden units that may stay."""
    roles = [p for mlp in model.mlps() for p in (mlp.score, mlp.alpha)]
    weights = [p for p in model.parameters() if all(p is not role for role in roles)]
    optimizer = torch.optim.AdamW(
        [{"params": weights, "lr": 2e-3}, {"params": roles, "lr": 12 / steps}], weight_decay=0
    )
    for step in range(steps):
        done = step / steps
        for mlp in model.mlps():
            mlp.lam = None if budget is None else max(0.1, 0.99 - 2 * done)
        loss = loss_of(model, text)
        if budget is not None:
            target = 1 + (budget - 1) * min(1, 2 * done)  # from all units down to the budget
            expected = sum(mlp.expected_width() for mlp in model.mlps()) / (DEPTH * HIDDEN)
            loss = loss + 20 * (expected - target) ** 2
            loss = loss + 0.02 * max(0, 2 * done - 1) * sum(adaptive_one_hot_loss(mlp.alpha) for mlp in model.mlps())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def cut_to(model: CharacterModel, budget: float) -> list[int]:
    """Cut every MLP: the likeliest widths that together make up the budget."""
    log_p = [dict(zip(WIDTHS, mlp.alpha.log_softmax(0).tolist(), strict=True)) for mlp in model.mlps()]
    limit = budget * DEPTH * HIDDEN
    affordable = (w for w in product(WIDTHS, repeat=DEPTH) if limit - WIDTHS.step < sum(w) <= limit)
    widths = max(affordable, key=lambda w: sum(p[width] for p, width in zip(log_p, w, strict=True)))
    for mlp, width in zip(model.mlps(), widths, strict=True):
        mlp.cut(width)
    return list(widths)


@torch.no_grad()
def bits(model: nn.Module, text: Tensor) -> float:
    """Bits per character on text the model has not seen."""
    torch.manual_seed(0)
    return sum(float(loss_of(model, text)) for _ in range(20)) / 20 / math.log(2)


def main(steps: int = 600, budget: float = 0.375, seed: int = 0) -> None:
    """Search the MLP widths of a character model.

    Args:
        steps: of the search; half as many follow after the cut.
        budget: share of the hidden units that may stay.
        seed: of weights and batches.
    """
    text = "".join(topics[name] for name in sorted(topics))
    index = {character: i for i, character in enumerate(sorted(set(text)))}
    data = torch.tensor([index[c] for c in text])
    seen, unseen = data[: len(data) * 9 // 10], data[len(data) * 9 // 10 :]

    results = {}
    for name, hidden in (("dense", HIDDEN), (f"{budget:.1%} everywhere", round(budget * HIDDEN))):
        torch.manual_seed(seed)
        model = CharacterModel(len(index), hidden)
        train(model, seen, steps + steps // 2)
        results[name] = [hidden] * DEPTH, bits(model, unseen)

    torch.manual_seed(seed)
    model = CharacterModel(len(index), HIDDEN)
    train(model, seen, steps, budget)
    widths = cut_to(model, budget)
    train(model, seen, steps // 2)
    results["searched"] = widths, bits(model, unseen)

    for name, (widths, value) in results.items():
        print(f"{name:>18}  widths {' '.join(f'{w:3}' for w in widths)}  {value:.3f} bits per character")


if __name__ == "__main__":
    tyro.cli(main)
