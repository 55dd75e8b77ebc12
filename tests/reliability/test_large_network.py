"""A supernet of ViT-L in bounded memory

It takes steps, prunes and shrinks within the memory its parameters account for. In a process of its own, whose greatest
resident size the system keeps, a supernet of `vit_large_patch16_224` (24
blocks, 304 million parameters, float32) takes a real step with AdamW, drops candidates and units, and takes another.
The bound is derived: five numbers for each parameter (weight, gradient, two moments, and the masked weight that the
forward makes), what an image leaves for the backward, and what Python and torch take for a step of a tiny network
before. After pruning, parameters, gradients and moments together take as much less memory as the
parameters are fewer. `make test` runs two of the 24 blocks.
"""

import json
import subprocess
import sys

GIBIBYTE = 2**30
NUMBERS_A_PARAMETER = 5
# What a block keeps of each token for the backward, in units of the width: q, k, v and what attention makes of them, 4
# hidden units before and 4 after the activation, in and out of two norms, two branches and their sums, two masked.
FLOATS_A_CHANNEL = 4 + 8 + 4 + 4 + 2

PROGRAM = """
import json, resource, sys
import timm, torch
from ofb import Supernet

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

def held(supernet, optimizer):
    moments = [each for state in optimizer.state.values() for each in state.values() if torch.is_tensor(each)]
    gradients = [each.grad for each in supernet.parameters() if each.grad is not None]
    return sum(each.numel() * each.element_size() for each in [*supernet.parameters(), *gradients, *moments])

def searched(**sizes):
    supernet = Supernet(timm.create_model("vit_large_patch16_224", **sizes), "50%", epochs=1, steps_per_epoch=2)
    return supernet, torch.optim.AdamW(supernet.parameter_groups(), lr=1e-3)

def step(supernet, optimizer):
    losses = supernet.loss(torch.randn(1, 3, 224, 224), torch.tensor([7]))
    optimizer.zero_grad()
    losses.total.backward()
    optimizer.step()
    return losses.total.item()

torch.manual_seed(0)
torch.set_num_threads(1)
step(*searched(depth=1, embed_dim=32, num_heads=2))
before = peak()
supernet, optimizer = searched(depth=int(sys.argv[1]))
losses = [step(supernet, optimizer)]
report = {"before": before, "parameters": sum(each.numel() for each in supernet.model.parameters())}
report["held"] = held(supernet, optimizer)
supernet.finalize(optimizer)
report |= {"fewer": sum(each.numel() for each in supernet.model.parameters())}
losses.append(step(supernet, optimizer))
report |= {"held_after": held(supernet, optimizer), "losses": losses, "peak": peak()}
report["extracted"] = sum(each.numel() for each in supernet.extract().parameters())
print(json.dumps(report))
"""


def test_a_step_and_pruning_of_vit_large(night, evidence):
    depth = 24 if night else 2
    run = subprocess.run([sys.executable, "-W", "ignore", "-c", PROGRAM, str(depth)], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    report = json.loads(run.stdout.splitlines()[-1])
    parameters, fewer = report["parameters"], report["fewer"]
    activations = 197 * 1024 * depth * FLOATS_A_CHANNEL * 4
    bound = report["before"] + NUMBERS_A_PARAMETER * 4 * parameters + activations
    assert report["peak"] <= bound, f"{report['peak'] / GIBIBYTE:.2f} GiB, expected at most {bound / GIBIBYTE:.2f}"
    assert all(0 < loss < 1000 for loss in report["losses"])
    assert fewer < 0.75 * parameters and report["extracted"] <= fewer
    assert report["held_after"] / report["held"] <= 1.02 * fewer / parameters
    evidence("parameters of the supernet", parameters)
    evidence("of these after pruning", fewer)
    evidence("greatest resident memory", f"{report['peak'] / GIBIBYTE:.2f} GiB")
    evidence("derived bound", f"{bound / GIBIBYTE:.2f} GiB")
    held, after = (report[name] / GIBIBYTE for name in ("held", "held_after"))
    evidence("weights, gradients and moments before and after pruning", f"{held:.2f} GiB → {after:.2f} GiB")
