"""Every kernel of an op once, forward and backward, on very little data: what compute-sanitizer can watch in seconds.

    compute-sanitizer --tool memcheck python -m benchmarks.card.tiny_case masked_attention --device cuda
"""

import argparse

import torch

import ofb_kernels
from benchmarks.card.smoke import case_of
from benchmarks.floors import TINY, Sizes
from benchmarks.measure import mixed_precision, synchronize
from benchmarks.ops import pass_of


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("op", help="a public op")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    case = case_of(arguments.op, Sizes(2, **TINY).pruned(), arguments.device)
    pass_of(lambda: case.run("triton"), case, "both" if case.leaves() else "forward")()
    if arguments.op == "masked_attention":
        biased(case.inputs["qkv"], case.inputs["mask"], arguments.device)
    synchronize()


def biased(qkv: torch.Tensor, mask: torch.Tensor, device: str) -> None:
    """Attention with a bias on the scores has kernels of its own."""
    tokens, heads = qkv.shape[1], qkv.shape[3]
    bias = torch.randn(heads, tokens, tokens, device=device, requires_grad=True)
    with mixed_precision(device):
        ofb_kernels.masked_attention(qkv, mask, bias=bias, backend="triton").float().square().sum().backward()


if __name__ == "__main__":
    main()
