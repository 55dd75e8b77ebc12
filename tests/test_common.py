"""What tests share is itself right: nothing is rounded unasked, and only what is not determined is left out."""

import torch

from tests.common import determined, tiny_vit


def test_float32_is_not_rounded_to_tf32():
    assert not torch.backends.cudnn.allow_tf32 and not torch.backends.cuda.matmul.allow_tf32


def test_only_the_bias_of_k_is_not_determined():
    torch.manual_seed(0)
    model = tiny_vit().double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    loss = torch.nn.functional.cross_entropy(model(torch.randn(8, 3, 16, 16).double()), torch.arange(8) % 5)
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    kept = determined(gradients)
    assert kept.keys() == gradients.keys()
    for name, gradient in gradients.items():
        assert kept[name].abs().min() > 1e-9, name
        if name.endswith("qkv.bias"):
            _, k, _ = gradient.chunk(3)
            assert k.abs().max() < 1e-15, name
            assert kept[name].numel() == 2 * k.numel()
        else:
            assert kept[name] is gradient
