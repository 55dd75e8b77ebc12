"""int8 weights for a found network, by torchao: the network is a plain one, so nothing here is special to it.

python examples/quantize.py                        # on a network made here, from digits
python examples/quantize.py --network runs/demo/export
"""

import copy
import io

import timm
import torch
import torch.nn.functional as F
import tyro
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torchao.quantization import Int8WeightOnlyConfig, quantize_

import ofb
from ofb.supernet.families import count_macs


def small_network(images: Tensor, targets: Tensor, epochs: int) -> nn.Module:
    """A ViT cut to half of its MACs by the weights it starts with, and trained."""
    sizes = {"img_size": 8, "patch_size": 2, "in_chans": 1, "embed_dim": 64, "depth": 3, "num_heads": 4}
    model = ofb.Supernet(timm.create_model("vit_tiny_patch16_224", num_classes=10, **sizes), target="50%").extract()
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    for _ in range(epochs):
        for batch in torch.randperm(len(images)).split(64):
            F.cross_entropy(model(images[batch]), targets[batch]).backward()
            optimizer.step()
            optimizer.zero_grad()
    return model.eval()


def kilobytes(model: nn.Module) -> float:
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    return buffer.tell() / 1000


@torch.no_grad()
def main(network: str | None = None, epochs: int = 20) -> None:
    """Quantize the weights of all linear layers to int8, and compare.

    Args:
        network: folder of a saved network for scikit-learn's digits; one is made if not given.
        epochs: of the training of the network made here.
    """
    torch.manual_seed(0)
    images, targets = (torch.from_numpy(array) for array in load_digits(return_X_y=True))
    images = images.float().div(8).sub(1).view(-1, 1, 8, 8)
    with torch.enable_grad():
        model = ofb.load(network) if network else small_network(images[:1497], targets[:1497], epochs)

    quantized = copy.deepcopy(model)
    quantize_(quantized, Int8WeightOnlyConfig(version=2))

    images, targets = images[1497:], targets[1497:]
    logits = {"float32": model(images), "int8": quantized(images)}
    for (name, each), size in zip(logits.items(), map(kilobytes, (model, quantized)), strict=True):
        right = (each.argmax(1) == targets).float().mean()
        print(f"{name:>7}  top-1 {right:.1%}  {size:.0f} KB  of {count_macs(model) / 1e6:.2f} M MACs")
    difference = (logits["int8"] - logits["float32"]).abs().max() / logits["float32"].abs().max()
    print(f"largest difference of a logit: {difference:.2%} of the largest logit")


if __name__ == "__main__":
    tyro.cli(main)
