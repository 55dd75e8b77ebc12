"""Physical removal of units: parameters keep their identity, moments follow their rows."""

import pytest
import torch
from torch import nn

from ofb.supernet.pruning import Coupling, keep_units, replace_data, reset_moments

COUPLINGS = [Coupling("0.weight", 0, repeats=3), Coupling("0.bias", 0, repeats=3), Coupling("1.weight", 1)]


def make_network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(5, 12), nn.Linear(4, 3))  # 3 × 4 units out, as qkv; 4 units in


def run_step(network, optimizer):
    optimizer.zero_grad()
    units = network[0](torch.randn(7, 5)).unflatten(1, (3, -1)).sum(1)
    loss = network[1](units).square().sum()
    loss.backward()
    optimizer.step()
    return loss


OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.1),
    "amsgrad": lambda p: torch.optim.AdamW(p, lr=0.1, amsgrad=True),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.1, momentum=0.9, centered=True),
    "nadam": lambda p: torch.optim.NAdam(p, lr=0.1),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_rows_of_parameters_gradients_and_moments(name):
    network = make_network()
    optimizer = OPTIMIZERS[name](network.parameters())
    run_step(network, optimizer)
    before = {n: (p, p.detach().clone(), p.grad.clone()) for n, p in network.named_parameters()}
    moments = {
        n: {k: v.clone() for k, v in optimizer.state[p].items() if torch.is_tensor(v)} for n, (p, *_) in before.items()
    }
    index = torch.tensor([0, 2, 3])
    keep_units(network, COUPLINGS, index, (1, 4), optimizer)
    rows = torch.tensor([0, 2, 3, 4, 6, 7, 8, 10, 11])
    selected = {"0.weight": (0, rows), "0.bias": (0, rows), "1.weight": (1, index), "1.bias": (0, torch.arange(3))}
    for parameter_name, (dim, kept) in selected.items():
        parameter = network.get_parameter(parameter_name)
        old, data, grad = before[parameter_name]
        assert parameter is old
        assert torch.equal(parameter, data.index_select(dim, kept))
        assert torch.equal(parameter.grad, grad.index_select(dim, kept))
        for key, value in moments[parameter_name].items():
            expected = value.index_select(dim, kept) if value.dim() else value
            assert torch.equal(optimizer.state[parameter][key], expected), key
    run_step(network, optimizer)


def test_a_live_graph_does_not_stand_in_the_way():
    network = make_network()
    optimizer = torch.optim.AdamW(network.parameters())
    loss = run_step(network, optimizer)  # still referenced while the next step runs
    keep_units(network, COUPLINGS, torch.tensor([1, 2]), (1, 4), optimizer)
    run_step(network, optimizer)
    assert loss.isfinite()
    assert network[0].weight.grad.shape == (6, 5)


def test_pruned_training_equals_training_of_the_smaller_network():
    """The removed unit never mattered, so the rest must go on as if it had never been there."""
    network, smaller = make_network(), nn.Sequential(nn.Linear(5, 9), nn.Linear(3, 3))
    with torch.no_grad():
        network[1].weight[:, 3] = 0
        for row in (3, 7, 11):
            network[0].weight[row], network[0].bias[row] = 0, 0
    optimizer = torch.optim.AdamW(network.parameters(), lr=0.01)
    keep_units(network, COUPLINGS, torch.tensor([0, 1, 2]), (1, 4), optimizer)
    smaller.load_state_dict(network.state_dict())
    other = torch.optim.AdamW(smaller.parameters(), lr=0.01)
    for seed in range(3):
        torch.manual_seed(seed)
        run_step(network, optimizer)
        torch.manual_seed(seed)
        run_step(smaller, other)
    for ours, theirs in zip(network.parameters(), smaller.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_factored_moments_are_refused_before_anything_changes():
    network = make_network()
    optimizer = torch.optim.Adafactor(network.parameters())
    run_step(network, optimizer)
    shapes = [p.shape for p in network.parameters()]
    with pytest.raises(ValueError, match=r"got Adafactor, which keeps row_var, of shape \(12, 1\), of a parameter of"):
        keep_units(network, COUPLINGS, torch.tensor([0]), (1, 4), optimizer)
    assert [p.shape for p in network.parameters()] == shapes


def test_reset_moments():
    network = make_network()
    optimizer = torch.optim.AdamW(network.parameters())
    run_step(network, optimizer)
    reset_moments(network[0].weight, optimizer)
    assert network[0].weight not in optimizer.state
    assert network[0].bias in optimizer.state
    reset_moments(network[0].weight, None)


def test_replace_data_keeps_the_parameter_and_drops_its_gradient():
    parameter = nn.Parameter(torch.randn(4))
    parameter.sum().backward()
    replace_data(parameter, torch.ones(2))
    assert parameter.grad is None
    assert parameter.tolist() == [1, 1]
    parameter.sum().backward()
    assert parameter.grad.tolist() == [1, 1]
