"""The least time each op and a whole search step could take, computed from shapes: no GPU is needed.

    python -m benchmarks.floors [--model deit_small deit_base] [--batch-size 64 256 1024] [--tflops 790 --tbps 4.3]

A group is what one fused kernel or product does. It takes at least the longer of its operations at peak rate and its
least bytes (each operand read once, each result written once) at peak bandwidth; a pass takes the sum of its groups.
Activations are bfloat16, the residual stream and all parameters float32, as under autocast.

Beside a step's floor stands what it should take on an H200 and on an H100 as a CUDA graph: what such groups have
reached of their floors in a measured step, and what its launches take besides (`predicted_seconds`).
"""

import argparse
import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

HALF, FULL = 2, 4  # bytes of an activation, of the residual stream and of a parameter
PATCH, CLASSES = 16, 1000
TFLOPS, TBPS = 790.0, 4.3  # what large bf16 products and copies reach on an H200; benchmarks.ops measures both


@dataclass(frozen=True)
class Rates:
    """Ceilings of a GPU: operations and bytes a second."""

    operations: float = TFLOPS * 1e12
    bytes: float = TBPS * 1e12


@dataclass(frozen=True)
class Group:
    """Operations (two for a multiply-accumulate) and least bytes of one fused kernel or product."""

    name: str
    operations: float
    bytes: float

    def seconds(self, rates: Rates) -> float:
        return max(self.operations / rates.operations, self.bytes / rates.bytes)


@dataclass(frozen=True)
class Sizes:
    """A ViT of equal blocks on `batch` square images in patches of 16; 197 tokens are 224 × 224 pixels."""

    batch: int
    width: int
    heads: int
    head_dim: int
    hidden: int
    depth: int = 12
    tokens: int = 197

    @property
    def rows(self) -> int:
        return self.batch * self.tokens

    @property
    def side(self) -> int:
        """Pixels of an image's side."""
        return PATCH * math.isqrt(self.tokens - 1)

    @property
    def drawn(self) -> int:
        """Patches of an image that masked image modelling hides at most, a quarter."""
        return math.ceil((self.tokens - 1) / 4)

    @property
    def attention_width(self) -> int:
        return self.heads * self.head_dim

    def halved(self) -> "Sizes":
        """Half the residual width and hidden units, and the pairs of heads that fit into half: heads come in pairs."""
        half = {"width": self.width // 2, "heads": self.heads // 4 * 2, "hidden": self.hidden // 2}
        return replace(self, **half)

    def pruned(self) -> "Sizes":
        """About half of everything, a head less, in sizes that are multiples of 8 and not of 16."""
        half = {name: getattr(self, name) // 32 * 16 + 8 for name in ("width", "head_dim", "hidden")}
        return replace(self, heads=max(1, self.heads - 1), **half)

    def named(self, size: str) -> "Sizes":
        """The sizes that "full", "half" or "pruned" stands for."""
        return {"full": lambda: self, "half": self.halved, "pruned": self.pruned}[size]()


SIZES = {
    "deit_small": {"width": 384, "heads": 6, "head_dim": 64, "hidden": 1536},
    "deit_base": {"width": 768, "heads": 12, "head_dim": 64, "hidden": 3072},
}
TINY = {"width": 64, "heads": 4, "head_dim": 16, "hidden": 128, "depth": 1, "tokens": 10}  # to rehearse with on a CPU
MODELS = SIZES | {"tiny": TINY}


def seconds(groups: Iterable[Group], rates: Rates) -> float:
    return sum(group.seconds(rates) for group in groups)


def product(name: str, rows: int, inner: int, columns: int, read: int = 0, written: int = 0) -> Group:
    """(rows, inner) @ (inner, columns) of half-precision operands, and bytes that its epilogue moves besides."""
    operands = HALF * (rows * inner + inner * columns + rows * columns)
    return Group(name, 2 * rows * inner * columns, operands + read + written)


# ---- the ops: (forward, backward) ----


def masked_linear(s: Sizes) -> tuple[list[Group], list[Group]]:
    """fc1 with bias, mask and GELU; the pre-activation is kept."""
    pre = HALF * s.rows * s.hidden
    forward = [product("fc1 + bias, mask, GELU", s.rows, s.width, s.hidden, written=pre)]
    backward = [
        Group("GELU', mask, column sums", 0, 3 * pre),
        product("dx", s.rows, s.hidden, s.width),
        product("dW", s.width, s.rows, s.hidden),
    ]
    return forward, backward


def masked_mlp(s: Sizes) -> tuple[list[Group], list[Group]]:
    pre = HALF * s.rows * s.hidden
    forward = [
        product("fc1 + bias, mask, GELU", s.rows, s.width, s.hidden, written=pre),
        product("fc2", s.rows, s.hidden, s.width),
    ]
    backward = [
        product("dhidden + GELU', mask, column sums", s.rows, s.width, s.hidden, read=pre),
        product("dW fc2", s.width, s.rows, s.hidden),
        product("dx", s.rows, s.hidden, s.width),
        product("dW fc1", s.width, s.rows, s.hidden),
    ]
    return forward, backward


def masked_attention(s: Sizes) -> tuple[list[Group], list[Group]]:
    scores = 2 * s.batch * s.heads * s.tokens**2 * s.head_dim  # operations of one of its products
    part = HALF * s.rows * s.attention_width  # bytes of q, k, v or the result
    return [Group("attention", 2 * scores, 4 * part)], [Group("attention backward", 5 * scores, 8 * part)]


def masked_qkv_attention(s: Sizes) -> tuple[list[Group], list[Group]]:
    """The projection and its attention; the mask and the folding of it are small beside them."""
    forward, backward = masked_attention(s)
    columns = 3 * s.attention_width
    gradients = [product("dx", s.rows, columns, s.width), product("dW", s.width, s.rows, columns)]
    return [product("qkv", s.rows, s.width, columns), *forward], [*backward, *gradients]


def masked_layer_norm(s: Sizes) -> tuple[list[Group], list[Group]]:
    values = s.rows * s.width
    forward = [Group("norm", 0, (FULL + HALF) * values)]
    return forward, [Group("norm backward", 0, (2 * FULL + HALF) * values)]


def masked_add_layer_norm(s: Sizes) -> tuple[list[Group], list[Group]]:
    values = s.rows * s.width
    forward = [Group("add + norm", 0, (2 * FULL + 2 * HALF) * values)]
    return forward, [Group("add + norm backward", 0, (3 * FULL + 3 * HALF) * values)]


def local_norm(s: Sizes) -> tuple[list[Group], list[Group]]:
    return [Group("reconstruction target", 0, 2 * FULL * s.batch * 3 * s.side**2)], []


def masked_reconstruction_loss(s: Sizes) -> tuple[list[Group], list[Group]]:
    """Of a quarter of the patches; a byte keeps the sign of each error for the backward."""
    images, errors = FULL * s.batch * 3 * s.side**2, s.batch * s.drawn * 3 * PATCH**2
    forward = [Group("reconstruction loss", 0, images + (HALF + 1) * errors)]
    return forward, [Group("reconstruction loss backward", 0, (HALF + 1) * errors)]


OPS = {op.__name__: op for op in (
    masked_linear, masked_mlp, masked_attention, masked_qkv_attention, masked_layer_norm, masked_add_layer_norm,
    local_norm, masked_reconstruction_loss,
)}  # fmt: skip


# ---- the step ----


def parameters(s: Sizes) -> int:
    """Of the network alone; scores, logits and decoder are few beside them."""
    block = 4 * s.width * s.attention_width + 2 * s.width * s.hidden
    return s.depth * block + s.width * (3 * PATCH**2 + CLASSES)


def step(s: Sizes) -> list[Group]:
    """Forward, losses, backward and AdamW of a search step."""
    patches, loss = s.batch * (s.tokens - 1), masked_reconstruction_loss(s)
    projections = [
        product("qkv", s.rows, s.width, 3 * s.attention_width),
        product("proj", s.rows, s.attention_width, s.width),
    ]
    mlp, attention, norm = masked_mlp(s), masked_attention(s), masked_add_layer_norm(s)
    block = [
        *projections, *projections, *projections,  # forward, data gradient, weight gradient
        *mlp[0], *mlp[1], *attention[0], *attention[1], *(2 * (norm[0] + norm[1])),
    ]  # fmt: skip
    embedding = product("patch embedding", patches, 3 * PATCH**2, s.width)
    return [
        embedding, embedding,
        *(s.depth * block),
        *(3 * [product("decoder", s.batch * s.drawn, s.width, 3 * PATCH**2)]), *loss[0], *loss[1],
        Group("AdamW", 0, 7 * FULL * parameters(s)),  # reads p, g, m, v, writes p, m, v
    ]  # fmt: skip


# ---- what a step should take ----

# What copies reach: measured on an H200; on an H100 the same share of its memory's peak, 3.35 TB/s instead of 4.8.
# Both have the same multiprocessors, so the rate of products is the H200's; an H100 at its power limit stays below.
CARDS = {"H200": Rates(), "H100": Rates(bytes=3.0e12)}
# Floor over measured time of groups in one step: DeiT-S, batch 256, an H200, profiled at commit 2ace869
# (benchmarks/NOTES.md). Plain products are cuBLAS's.
REACH_OF_PRODUCTS = 0.80  # 6.4 of 8.0 ms
REACH = {
    "add + norm": 0.70,  # 1.3 of 1.9 ms
    "add + norm backward": 0.71,  # 2.0 of 2.8 ms
    "casts": 0.70,  # taken to be AdamW's
    "AdamW": 0.70,  # 0.14 of 0.2 ms
}
# The same of kernels that wait on the multiprocessor, not for memory: as long on both cards. Issuing the instructions
# counted in their machine code would take 15 to 45 % of the time, so that this alone predicts nothing.
REACH_ON_CHIP = {
    "fc1 + bias, mask, GELU": 0.44,  # 0.98 of 2.2 ms
    "dhidden + GELU', mask, column sums": 0.44,  # 0.98 of 2.2 ms
    "attention": 0.36,  # 0.43 of 1.2 ms
    "attention backward": 0.20,  # 0.87 of 4.4 ms
    "reconstruction loss": 0.39,  # 43 of 110 µs: counted, not measured
}
# Upper bounds of what benchmarks.host counts, to be lowered whenever launches go; tests/test_host.py holds them.
LAUNCHES_IN_A_BLOCK, LAUNCHES_OUTSIDE = 24, 149
LAUNCH = 3.0e-6  # seconds of each in a CUDA graph: what the profiled groups leave of the step's 27.2 ms at bed2e9b


def predicted_seconds(
    s: Sizes, rates: Rates, launches: tuple[int, int] = (LAUNCHES_IN_A_BLOCK, LAUNCHES_OUTSIDE)
) -> float:
    """What a search step should take on a card, one of CARDS."""
    kernels = sum(_reached(group, rates) for group in [*step(s), *besides(s)])
    return kernels + LAUNCH * (launches[0] * s.depth + launches[1])


def _reached(group: Group, rates: Rates) -> float:
    least = group.seconds(rates)
    if group.name in REACH_ON_CHIP:
        return max(least, group.seconds(CARDS["H200"]) / REACH_ON_CHIP[group.name])
    return least / REACH.get(group.name, REACH_OF_PRODUCTS)


def besides(s: Sizes) -> list[Group]:
    """Passes over memory that a step makes for autocast: weights, whose gradients come in float32, and the images."""
    return [Group("casts", 0, (FULL + 2 * HALF) * parameters(s) + (FULL + HALF) * 3 * s.batch * s.side**2)]


def main() -> None:
    arguments = parse_arguments()
    rates = Rates(arguments.tflops * 1e12, arguments.tbps * 1e12)
    print(f"floors at {_rates(rates)}")
    for name, card in CARDS.items():
        print(f"{name}: what a step should take there as a CUDA graph, at {_rates(card)}")
    cards = "".join(f"{name:>9}" for name in CARDS)
    print(f"{'model':10} {'batch':>5} {'size':5} {'pass':34} {'GFLOP':>9} {'MB':>9} {'ms':>9}{cards}")
    for model in arguments.model:
        for batch in arguments.batch_size:
            full = Sizes(batch, **SIZES[model])
            for size, sizes in {"full": full, "half": full.halved()}.items():
                for name, groups in _passes(sizes):
                    operations, moved = sum(g.operations for g in groups), sum(g.bytes for g in groups)
                    figures = f"{operations / 1e9:9.1f} {moved / 1e6:9.1f} {1e3 * seconds(groups, rates):9.4f}"
                    print(f"{model:10} {batch:5} {size:5} {name:34} {figures}", end="" if name == "step" else "\n")
                print("".join(f"{1e3 * predicted_seconds(sizes, card):9.2f}" for card in CARDS.values()))


def _rates(rates: Rates) -> str:
    return f"{rates.operations / 1e12:g} TFLOP/s and {rates.bytes / 1e12:g} TB/s"


def _passes(sizes: Sizes) -> Iterable[tuple[str, list[Group]]]:
    for name, op in OPS.items():
        forward, backward = op(sizes)
        yield f"{name} forward", forward
        if backward:
            yield f"{name} backward", backward
    yield "step", step(sizes)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", nargs="+", choices=list(SIZES), default=list(SIZES))
    parser.add_argument("--batch-size", nargs="+", type=int, default=[64, 256, 1024])
    parser.add_argument("--tflops", type=float, default=TFLOPS, help="peak rate of bf16 products")
    parser.add_argument("--tbps", type=float, default=TBPS, help="peak bandwidth of memory, TB/s")
    return parser.parse_args()


if __name__ == "__main__":
    main()
