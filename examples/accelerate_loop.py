"""The search with Hugging Face's Accelerate: mixed precision, and as many processes as `accelerate launch` starts.

    python examples/accelerate_loop.py
    accelerate launch --cpu --num_processes 2 examples/accelerate_loop.py

Accelerate shards the data and moves it. The supernet is not wrapped, because a wrapper would hold on to parameters that
pruning replaces: gradients are averaged by hand, and so every process prunes alike.
"""

import timm
import torch
import tyro
from accelerate import Accelerator
from accelerate.utils import set_seed
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, TensorDataset

import ofb


def main(epochs: int = 30, mixed_precision: str = "no") -> None:
    """Search a small ViT for half of its MACs, from random weights.

    Args:
        epochs: of the search.
        mixed_precision: no, bf16 or fp16.
    """
    accelerator = Accelerator(mixed_precision=mixed_precision)
    set_seed(0)  # every process starts from the same network
    images, targets = (torch.from_numpy(array) for array in load_digits(return_X_y=True))
    images = images.float().div(8).sub(1).view(-1, 1, 8, 8)
    data = TensorDataset(images[:1497], targets[:1497])
    batch_size = 64 // accelerator.num_processes
    loader = accelerator.prepare(DataLoader(data, batch_size, shuffle=True, drop_last=True))

    sizes = {"img_size": 8, "patch_size": 2, "in_chans": 1, "embed_dim": 64, "depth": 3, "num_heads": 4}
    model = timm.create_model("vit_tiny_patch16_224", num_classes=10, **sizes).to(accelerator.device)
    supernet = ofb.Supernet(model, target="50%", epochs=epochs, steps_per_epoch=len(loader))
    optimizer = accelerator.prepare(torch.optim.AdamW(supernet.parameter_groups(), 2e-3))
    for _ in range(epochs):
        for x, y in loader:
            with accelerator.autocast():
                loss = supernet.loss(x, y).total
            accelerator.backward(loss)
            for parameter in supernet.parameters():
                if parameter.grad is not None:
                    parameter.grad = accelerator.reduce(parameter.grad, "mean")
            optimizer.step()
            optimizer.zero_grad()
            supernet.step(optimizer)

    found = supernet.extract().eval()
    with torch.no_grad():
        right = (found(images[1497:].to(accelerator.device)).argmax(1).cpu() == targets[1497:]).float().mean()
    checksum = torch.stack([p.abs().sum() for p in found.parameters()]).sum()
    same = accelerator.gather(checksum.view(1)).unique().numel() == 1
    accelerator.print(f"found  top-1 {right:.1%}  hidden channels {[b.mlp.fc1.out_features for b in found.blocks]}")
    accelerator.print(f"the same network in {accelerator.num_processes} process(es): {same}")


if __name__ == "__main__":
    tyro.cli(main)
