"""The search in your own training loop, on handwritten digits.

python examples/own_loop.py                      # a minute on one CPU core
"""

import timm
import torch
import torch.nn.functional as F
import tyro
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, TensorDataset

import ofb


def main(epochs: int = 30) -> None:
    """Train a small ViT, search it for half of its MACs, fine-tune what was found.

    Args:
        epochs: of the training, and of the search; half as many fine-tune.
    """
    torch.manual_seed(0)
    images, targets = (torch.from_numpy(array) for array in load_digits(return_X_y=True))
    images = images.float().div(8).sub(1).view(-1, 1, 8, 8)
    loader = DataLoader(TensorDataset(images[:1497], targets[:1497]), 64, shuffle=True, drop_last=True)

    def train(model: torch.nn.Module, epochs: int) -> None:
        optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
        for _ in range(epochs):
            for x, y in loader:
                F.cross_entropy(model(x), y).backward()
                optimizer.step()
                optimizer.zero_grad()

    sizes = {"img_size": 8, "patch_size": 2, "in_chans": 1, "embed_dim": 64, "depth": 3, "num_heads": 4}
    model = timm.create_model("vit_tiny_patch16_224", num_classes=10, **sizes)
    train(model, epochs)
    report("dense", model, images[1497:], targets[1497:])

    supernet = ofb.Supernet(model, target="50%", epochs=epochs, steps_per_epoch=len(loader))
    supernet.rank_scores([next(iter(loader))])  # the units the loss depends on start as the most important ones
    optimizer = torch.optim.AdamW(supernet.parameter_groups(), 2e-3)
    for _ in range(epochs):
        for x, y in loader:
            supernet.loss(x, y).total.backward()
            optimizer.step()
            optimizer.zero_grad()
            supernet.step(optimizer)  # schedules; prunes when it is time
    found = supernet.extract()  # a plain timm network
    train(found, epochs // 2)
    report("found", found, images[1497:], targets[1497:])


@torch.no_grad()
def report(name: str, model: torch.nn.Module, images: torch.Tensor, targets: torch.Tensor) -> None:
    right = (model.eval()(images).argmax(1) == targets).float().mean()
    hidden = [block.mlp.fc1.out_features for block in model.blocks]
    params = sum(p.numel() for p in model.parameters())
    print(f"{name}  top-1 {right:.1%}  parameters {params:,}  width {model.embed_dim}  hidden channels {hidden}")
    model.train()


if __name__ == "__main__":
    tyro.cli(main)
