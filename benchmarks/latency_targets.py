"""How near the networks found for a target of latency come to it, on the machine the table was measured on.

    python -m benchmarks.latency_targets --device cpu [--threads N]

The architecture logits are random: what is judged is the table and the choice of sizes, not a search. Each network is
timed in turns with the dense one, which shows how steady the machine is. The machine has to be idle.
"""

import argparse
import copy
from functools import partial

import timm
import torch
from torch import nn

from benchmarks.measure import COLUMNS, environment, interleave, quantiles, results_folder, write_csv
from ofb.supernet import LatencyTable, Supernet, measure_latency

MODELS = {
    "deit_tiny": ("deit_tiny_patch16_224", {}, ("75%", "50%", "35%")),
    "vit_tiny at 96 pixels, depth 4": ("vit_tiny_patch16_224", dict(img_size=96, depth=4), ("80%", "70%", "60%")),
    "swin, width 48, depths 2": (
        "swin_tiny_patch4_window7_224",
        dict(embed_dim=48, depths=(2, 2, 2, 2), num_heads=(2, 4, 8, 16)),
        ("80%", "70%", "60%"),
    ),
}
SEEDS = (0, 1)
ROUNDS = 40


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of the CPU")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    rows = []
    for subject, (name, options, shares) in MODELS.items():
        torch.manual_seed(0)
        model = timm.create_model(name, **options).eval().to(arguments.device)
        table = measure_latency(model)
        for share in shares:
            for seed in SEEDS:
                rows += timed(model, table, share, seed, arguments.device, subject)
    write_csv(rows, results_folder(arguments.device) / f"latency-{arguments.threads}-threads.csv")


@torch.inference_mode()
def timed(model: nn.Module, table: LatencyTable, share: str, seed: int, device: str, subject: str) -> list[dict]:
    """Rows of the schema, over the target: the network chosen for it, and the dense one over what the table says."""
    supernet = chosen(model, table, share, seed)
    found = supernet.extract().eval()
    images = torch.randn(1, model.patch_embed.proj.in_channels, *model.patch_embed.img_size, device=device)
    names = f"dense, beside seed {seed}", f"found, seed {seed}"
    asked = dict(zip(names, (supernet.dense_costs["latency_ms"], supernet.target["latency_ms"]), strict=True))
    runs = {name: partial(network, images) for name, network in zip(asked, (model, found), strict=True)}
    rows = []
    for name, seconds in interleave(runs, device, ROUNDS).items():
        times = [1e3 * each for each in quantiles(seconds)]
        over = [each / asked[name] for each in times]
        row = dict(zip(("ms_20", "ms", "ms_80"), (round(each, 4) for each in times), strict=True))
        row |= dict(zip(("over_base_20", "over_base", "over_base_80"), (round(each, 4) for each in over), strict=True))
        row |= {"benchmark": "latency", "subject": f"{share} of the latency of {subject}", "batch_size": 1}
        row |= {"size": "found", "pass": "forward"}
        row |= {"variant": name, "base": "table", "rounds": ROUNDS}
        rows.append({column: row.get(column) for column in COLUMNS} | environment(device))
        print(f"{subject:32} {share:4} {name:20} {times[1]:8.3f} ms  {over[1]:.3f} × asked", flush=True)
    return rows


def chosen(model: nn.Module, table: LatencyTable, share: str, seed: int) -> Supernet:
    """A supernet whose sizes are chosen by random logits."""
    torch.manual_seed(seed)
    options = dict(epochs=1, steps_per_epoch=2, latency_table=table)
    supernet = Supernet(copy.deepcopy(model), {"latency_ms": share}, **options)
    for bimask in supernet.bimasks.values():
        nn.init.normal_(bimask.alpha, std=2)
    supernet.finalize()
    return supernet


if __name__ == "__main__":
    main()
