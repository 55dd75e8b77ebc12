"""Supernet: pruning and folding preserve the function, the search ends on target, a step never waits for the device."""

import copy

import pytest
import timm
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from ofb.supernet import SearchSpace, Supernet
from ofb.supernet.budget import TOLERANCE
from ofb.supernet.families import count_macs
from ofb.supernet.masked_images import draw_areas, replace_patches
from ofb.supernet.ranking import taylor
from ofb_kernels import local_norm
from tests.common import tiny_vit

MODELS = ["vit_tiny_patch16_224", "deit_tiny_distilled_patch16_224"]
RESIDUAL_MASKS = ["stream", "input"]


def make_supernet(
    name="vit_tiny_patch16_224", device="cpu", dtype=torch.float32, model_options=None, **options
) -> Supernet:
    model = tiny_vit(name, **(model_options or {})).to(device, dtype)
    with torch.no_grad():
        for parameter in model.parameters():  # timm starts biases at 0 and norms at 1: a fold could miss them unseen
            parameter.add_(0.05 * torch.randn_like(parameter))
    whole_method = {"mask_ratio_start": 0.05, "mask_ratio_end": 0.25}
    return Supernet(model, **({"target": "50%", "epochs": 4, "steps_per_epoch": 6} | whole_method | options))


def make_batch(device="cpu", dtype=torch.float32, size=8, pixels=16):
    return torch.randn(size, 3, pixels, pixels, device=device, dtype=dtype), torch.randint(0, 5, (size,), device=device)


def train(supernet, steps, architecture_lr=0.1, seed=0, pixels=16):
    optimizer = torch.optim.AdamW(supernet.parameter_groups(architecture_lr=architecture_lr), lr=1e-3)
    like = next(supernet.model.parameters())
    torch.manual_seed(seed)
    for _ in range(steps):
        loss = supernet.loss(*make_batch(like.device, like.dtype, pixels=pixels))
        loss.total.backward()
        optimizer.step()
        optimizer.zero_grad()
        supernet.step(optimizer)
    return optimizer


def kill_units(supernet, keep_share=0.75) -> dict[str, torch.Tensor]:
    """Let the larger candidates of every submodule die and give the units beyond a mask of exactly 0."""
    survivors = {}
    for name, bimask in supernet.bimasks.items():
        alive = torch.zeros_like(bimask.alive)
        rows = max(1, int(keep_share * alive.shape[0]))
        alive[:rows, : max(1, int(keep_share * alive.shape[1]))] = True
        index, _ = bimask.units_kept_by(alive)
        dropped = torch.ones(bimask.candidates.units, dtype=torch.bool)
        dropped[index.cpu()] = False
        with torch.no_grad():
            bimask.score[dropped.to(bimask.score.device)] = -torch.inf  # S = 0
        bimask.alive = alive  # V = 0 beyond
        assert (bimask.mask(supernet.lam).flatten()[dropped] == 0).all()
        survivors[name] = alive
    supernet._build_stacks()
    return survivors


@pytest.mark.parametrize("residual_mask", RESIDUAL_MASKS)
@pytest.mark.parametrize("name", MODELS)
def test_pruning_preserves_the_function(name, residual_mask):
    supernet = make_supernet(name, dtype=torch.float64, residual_mask=residual_mask, model_options={"init_values": 0.5})
    supernet.eval()
    images, _ = make_batch(dtype=torch.float64)
    survivors = kill_units(supernet)
    if residual_mask == "input":  # plain LayerNorm weighs dead channels too: here the width must stay to compare
        del survivors["embed"]
    expected = supernet(images)
    units = {name: bimask.candidates.units for name, bimask in supernet.bimasks.items()}
    for name, alive in survivors.items():
        supernet._keep_candidates(name, alive, None, how="pruned")
        assert supernet.bimasks[name].candidates.units < units[name]
        torch.testing.assert_close(supernet(images), expected, atol=1e-9, rtol=0)


@pytest.mark.parametrize("residual_mask", RESIDUAL_MASKS)
@pytest.mark.parametrize("name", MODELS)
def test_folding_preserves_the_function(name, residual_mask):
    supernet = make_supernet(name, residual_mask=residual_mask, model_options={"init_values": 0.5})
    train(supernet, 24)
    assert supernet.finished
    supernet.eval()
    images, _ = make_batch()
    extracted = supernet.extract().eval()
    with torch.no_grad():
        expected, got = supernet(images), extracted(images)
    assert (got - expected).abs().max() <= 1e-6 * max(1.0, expected.abs().max().item())
    assert type(extracted) is type(supernet.model)
    assert not any("ofb" in type(module).__module__ for module in extracted.modules())


def test_extracted_runs_without_fused_attention():
    """timm's explicit attention reads `scale`, its fused one the head size: both must agree after folding."""
    supernet = make_supernet()
    train(supernet, 24)
    extracted = supernet.extract().eval()
    images, _ = make_batch()
    fused = extracted(images)
    for block in extracted.blocks:
        block.attn.fused_attn = False
    torch.testing.assert_close(extracted(images), fused, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("target", ["30%", "50%", "80%"])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_search_ends_on_target(target, seed):
    torch.manual_seed(seed)
    supernet = make_supernet(target=target, model_options={"depth": 3})
    train(supernet, 24, seed=seed)
    assert supernet.finished
    assert {choice["submodule"] for choice in supernet.choices} == set(supernet.bimasks)
    cost = count_macs(supernet.extract())
    assert (1 - TOLERANCE) * supernet.target_macs <= cost <= supernet.target_macs


@pytest.mark.parametrize("target", [{"params": "50%"}, {"macs": "60%", "params": "50%"}, "params=60%,macs=45%"])
def test_search_ends_within_all_budgets(target):
    supernet = make_supernet(target=target)
    train(supernet, supernet.total_steps)
    network = supernet.extract()
    costs = {"macs": count_macs(network), "params": sum(p.numel() for p in network.parameters())}
    assert supernet.finished
    assert 1 - TOLERANCE <= max(costs[kind] / limit for kind, limit in supernet.target.items()) <= 1


def test_unfinished_search_extracts_on_target_and_stays_open():
    supernet = make_supernet()
    train(supernet, 5)
    before = {name: tensor.clone() for name, tensor in supernet.state_dict().items() if torch.is_tensor(tensor)}
    extracted = supernet.extract()
    assert not supernet.finished
    assert (1 - TOLERANCE) * supernet.target_macs <= count_macs(extracted) <= supernet.target_macs
    after = supernet.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_parameters_keep_their_identity():
    supernet = make_supernet()
    before = dict(supernet.named_parameters())
    optimizer = train(supernet, 24)
    after = dict(supernet.named_parameters())
    assert before.keys() == after.keys()
    assert all(after[name] is parameter for name, parameter in before.items())
    shapes = {p: p.shape for p in after.values()}
    for parameter, state in optimizer.state.items():
        assert state["exp_avg"].shape == shapes[parameter]


@pytest.mark.parametrize("steps", [3, 13, 24])
def test_resumed_search_equals_an_uninterrupted_one(steps):
    def run(supernet, optimizer, seeds):
        for seed in seeds:
            torch.manual_seed(seed)
            supernet.loss(*make_batch()).total.backward()
            optimizer.step()
            optimizer.zero_grad()
            supernet.step(optimizer)

    def make_optimizer(supernet):
        return torch.optim.AdamW(supernet.parameter_groups(architecture_lr=0.1), lr=1e-3)

    torch.manual_seed(0)
    whole = make_supernet()
    optimizer = make_optimizer(whole)
    run(whole, optimizer, range(steps))
    state, optimizer_state = copy.deepcopy(whole.state_dict()), copy.deepcopy(optimizer.state_dict())
    run(whole, optimizer, range(steps, 30))

    torch.manual_seed(123)
    resumed = make_supernet()
    resumed.load_state_dict(state)
    optimizer = make_optimizer(resumed)
    optimizer.load_state_dict(optimizer_state)
    run(resumed, optimizer, range(steps, 30))
    assert resumed.choices == whole.choices
    expected = dict(whole.named_parameters())
    for name, parameter in resumed.named_parameters():
        assert torch.equal(parameter, expected[name]), name


def test_total_is_the_weighted_sum_of_its_parts():
    """Weights as they stand, and a reconstruction as large as the classification: its balance has no gradient."""
    supernet = make_supernet(dtype=torch.float64, one_hot_weight=0.3, one_hot_delay=0.0, macs_weight=70.0, pace=0.0)
    images, targets = make_batch(dtype=torch.float64)
    decoder = supernet.masked_images.decoder.weight

    def losses():
        torch.manual_seed(0)
        return supernet.loss(images, targets)

    parts = losses()
    assert min(parts.one_hot, parts.macs, parts.reconstruction) > 1e-3
    expected = parts.classification + 0.3 * parts.one_hot + 70 * parts.macs + parts.classification
    torch.testing.assert_close(parts.total, expected, check_dtype=False, rtol=1e-6, atol=0)
    (gradient,) = torch.autograd.grad(parts.total, decoder)
    direction, step, ends = torch.randn_like(decoder), 1e-4, []
    for way in (step, -step):
        with torch.no_grad():
            decoder += way * direction
            ends.append(losses().reconstruction.double())
            decoder -= way * direction
    slope = parts.classification / parts.reconstruction * (ends[0] - ends[1]) / (2 * step)
    torch.testing.assert_close((gradient * direction).sum(), slope, check_dtype=False, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("residual_mask", RESIDUAL_MASKS)
def test_no_host_synchronization_between_prunes(residual_mask):
    """Tensors on the meta device have no values: whatever waits for one raises there."""
    supernet = make_supernet(steps_per_epoch=100, residual_mask=residual_mask).to("meta")
    optimizer = torch.optim.SGD(supernet.parameters(), lr=1e-3)
    losses = supernet.loss(*make_batch("meta"))
    losses.total.backward()
    optimizer.step()
    optimizer.zero_grad()
    supernet.step(optimizer)
    with pytest.raises(RuntimeError, match="meta"):
        losses.total.item()


class CountCalls(TorchDispatchMode):
    """Counts the operator calls that compute something; views do not."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls += not any(result.alias_info and not result.alias_info.is_write for result in func._schema.returns)
        return func(*args, **(kwargs or {}))


def test_calls_grow_neither_with_candidates_nor_with_blocks():
    """Masks, one-hot losses and expected MACs of a whole network, backward included."""

    def calls(embed_dim, depth):
        options = {"embed_dim": embed_dim, "num_heads": embed_dim // 8, "depth": depth}
        supernet = make_supernet(model_options=options)
        with CountCalls() as count:
            one_hot, sizes = supernet._statistics()
            (one_hot + supernet.goals(*sizes)).backward()
            masks = supernet._masks()
            torch.autograd.backward(list(masks.values()), [torch.ones_like(mask) for mask in masks.values()])
        per_submodule = 3 * len(masks)  # the ones just made, and gradients handed to two parameters of each, added up
        return sum(supernet.alive_candidates().values()), count.calls - per_submodule

    (few, expected), (many, got), (blocks, got_for_blocks) = calls(16, 2), calls(128, 2), calls(16, 6)
    assert many > 1.5 * few and blocks > 2 * few
    assert got == got_for_blocks == expected


@pytest.mark.parametrize("residual_mask", RESIDUAL_MASKS)
@pytest.mark.parametrize("backend", ["eager", "triton"])
def test_step_agrees_with_the_float64_reference(backend, residual_mask, device, monkeypatch):
    exact = make_supernet(device=device, dtype=torch.float64, residual_mask=residual_mask, backend="reference")
    supernet = make_supernet(device=device, residual_mask=residual_mask, backend=backend)
    supernet.load_state_dict(exact.state_dict())
    images, targets = make_batch(device)

    def run(network, dtype):
        torch.manual_seed(0)
        patches, masked = torch.rand(8, 16, device=device).argsort(1)[:, :4], torch.arange(4, device=device) < 3
        monkeypatch.setattr("ofb.supernet.masked_images.draw_areas", lambda *_: (patches, masked))
        losses = network.loss(images.to(dtype), targets)
        losses.total.backward()
        return losses, {name: p.grad for name, p in network.named_parameters() if p.grad is not None}

    (expected, exact_gradients), (got, gradients) = run(exact, torch.float64), run(supernet, torch.float32)
    assert got.total.item() == pytest.approx(expected.total.item(), rel=1e-4)
    assert gradients.keys() == exact_gradients.keys()
    for name, gradient in gradients.items():
        error = (gradient.double() - exact_gradients[name]).norm() / exact_gradients[name].norm().clamp(min=1e-6)
        assert error < 1e-3, name


def test_every_parameter_learns():
    supernet = make_supernet(model_options={"init_values": 0.1})
    supernet.steps = 20
    supernet._set_schedules()
    supernet.loss(*make_batch()).total.backward()
    silent = {n for n, p in supernet.named_parameters() if p.grad is None or p.grad.abs().max() == 0}
    assert silent == {f"bimasks.{name}.scale" for name in supernet.bimasks}


def test_reconstruction_compares_each_patch_with_its_own_pixels(monkeypatch):
    supernet = make_supernet().eval()
    images, targets = make_batch()
    supernet.mask_ratio.fill_(0.2)
    area, mask_token = supernet.masked_images.area, supernet.masked_images.mask_token
    patches, masked = draw_areas(8, 16, supernet.mask_ratio, 0.25)
    monkeypatch.setattr("ofb.supernet.masked_images.draw_areas", lambda *_: (patches, masked))
    loss = supernet.loss(images, targets).reconstruction

    embeddings = supernet.model.patch_embed(images)
    replaced = replace_patches(embeddings, area, patches, masked, mask_token)
    tokens = supernet.family.features(supernet.model, replaced, *supernet._all_masks())
    decoded = supernet.masked_images.decoder(tokens[:, 1:])  # every patch, the 4 × 4 of them row by row
    picture = torch.nn.functional.pixel_shuffle(decoded.mT.unflatten(2, (4, 4)), 4)
    counts = torch.zeros(8, 16, dtype=torch.bool).scatter(1, patches, masked.expand(8, -1)).view(8, 4, 4)
    pixels = counts.repeat_interleave(4, 1).repeat_interleave(4, 2)
    expected = (picture - local_norm(images)).abs().mean(1)[pixels].mean()
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype, device):
    supernet = make_supernet(device=device)
    optimizer = torch.optim.AdamW(supernet.parameters(), lr=1e-3)
    for _ in range(3):
        with torch.autocast(device, dtype=dtype):
            losses = supernet.loss(*make_batch(device))
        losses.total.backward()
        optimizer.step()
        optimizer.zero_grad()
        supernet.step(optimizer)
        assert losses.total.dtype == torch.float32
        assert losses.total.isfinite()


def test_gradient_checkpointing_changes_nothing():
    supernet = make_supernet(model_options={"drop_path_rate": 0.0})
    gradients = []
    batch = make_batch()
    for enabled in (False, True):
        supernet.model.set_grad_checkpointing(enabled)
        torch.manual_seed(1)
        supernet.loss(*batch).total.backward()
        gradients.append([p.grad.clone() for p in supernet.parameters() if p.grad is not None])
        supernet.zero_grad()
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, checkpointed)


def test_after_the_search_the_loss_is_classification_alone():
    supernet = make_supernet()
    train(supernet, 24)
    losses = supernet.loss(*make_batch())
    assert losses.total.item() == losses.classification.item()
    assert losses.one_hot == losses.macs == losses.reconstruction == 0
    losses.total.backward()
    assert supernet.bimasks["embed"].scale.grad is not None
    assert supernet.masked_images.decoder.weight.grad is None


def test_mixup_targets():
    images, targets = make_batch()
    probabilities = torch.nn.functional.one_hot(targets, 5).float()
    assert make_supernet().loss(images, probabilities).total.isfinite()


def test_figures():
    supernet = make_supernet()
    least, most = supernet.reachable()
    assert least < supernet.target_macs < most == supernet.dense_macs == count_macs(supernet.model)
    assert least < supernet.expected_macs() < most
    assert supernet.alive_candidates() == {"embed": 17, "attn0": 14, "mlp0": 7, "attn1": 14, "mlp1": 7}


def test_parameter_groups():
    supernet = make_supernet()
    decay, no_decay, score, architecture = supernet.parameter_groups(0.01, architecture_lr=0.5, score_lr=0.3)
    names = {p: n for n, p in supernet.named_parameters()}
    assert {names[p] for p in architecture["params"]} == {f"bimasks.{n}.alpha" for n in supernet.bimasks}
    assert (architecture["betas"], architecture["lr"], architecture["weight_decay"]) == ((0.5, 0.999), 0.5, 0.0)
    assert {names[p] for p in score["params"]} == {f"bimasks.{n}.score" for n in supernet.bimasks}
    assert (score["lr"], score["weight_decay"]) == (0.3, 0.0)
    assert {"model.cls_token", "model.pos_embed", "masked_images.mask_token", "bimasks.embed.scale"} <= {
        names[p] for p in no_decay["params"]
    }
    assert all(p.dim() >= 2 for p in decay["params"])
    assert sum(len(group["params"]) for group in (decay, no_decay, score, architecture)) == len(names)
    *weights, score, architecture = supernet.parameter_groups()
    assert all("lr" not in group for group in weights)
    assert (score["lr"], architecture["lr"]) == pytest.approx((0.5 / 24, 25 / 24))  # over 4 epochs of 6 steps


def test_scores_start_in_the_order_of_magnitude():
    torch.manual_seed(1)
    random = make_supernet(score_init="random")
    torch.manual_seed(1)
    ranked = make_supernet()
    for name, bimask in ranked.bimasks.items():
        assert torch.equal(bimask.score.sort().values, random.bimasks[name].score.sort().values)
    fc1, fc2 = ranked.model.blocks[0].mlp.fc1, ranked.model.blocks[0].mlp.fc2
    magnitude = fc1.weight.square().sum(1) + fc2.weight.square().sum(0) + fc1.bias.square()
    assert torch.equal(ranked.bimasks["mlp0"].score.argsort(), magnitude.argsort())
    with pytest.raises(ValueError, match="score_init: expected one of taylor, magnitude, random, got 'zero'"):
        make_supernet(score_init="zero")


def test_rank_scores_asks_the_loss():
    supernet = make_supernet(score_init="taylor").train()
    before = {name: p.detach().clone() for name, p in supernet.named_parameters()}
    batches = [(torch.randn(6, 3, 16, 16), torch.randint(5, (6,))) for _ in range(2)]
    supernet.rank_scores(iter(batches))
    fc1, fc2 = (supernet.model.get_submodule(f"blocks.0.mlp.{name}") for name in ("fc1", "fc2"))
    expected = 0.0
    for images, targets in batches:
        loss = torch.nn.functional.cross_entropy(supernet.model.eval()(images), targets)
        weights = (fc1.weight, fc1.bias, fc2.weight)
        into, bias, out = ((w * g) ** 2 for w, g in zip(weights, torch.autograd.grad(loss, weights), strict=True))
        expected = expected + into.sum(1) + bias + out.sum(0)
    assert torch.equal(supernet.bimasks["mlp0"].score.argsort(), expected.argsort())
    for name, parameter in supernet.named_parameters():
        if not name.endswith(".score"):
            assert torch.equal(parameter, before[name]) and parameter.grad is None
        else:
            assert torch.equal(parameter.sort().values, before[name].sort().values)
    assert not torch.equal(supernet.bimasks["mlp0"].score, before["bimasks.mlp0.score"])


def test_rank_scores_leaves_the_mode():
    supernet = make_supernet().train()
    supernet.rank_scores([(torch.randn(2, 3, 16, 16), torch.tensor([0, 1]))])
    assert supernet.model.training
    supernet.eval().rank_scores([(torch.randn(2, 3, 16, 16), torch.tensor([0, 1]))])
    assert not supernet.model.training


def test_the_loss_is_asked_of_the_whole_network():
    """No branch is dropped, whatever the mode, and of several batches each counts."""
    model = tiny_vit(drop_path_rate=0.9).train()
    batches = [(torch.randn(2, 3, 16, 16), torch.tensor([0, 1])) for _ in range(2)]
    both, again = taylor(model, batches), taylor(model.eval(), batches)
    alone = [taylor(model, [batch]) for batch in batches]
    for name, importance in both.items():
        assert torch.equal(importance, again[name])
        torch.testing.assert_close(importance, alone[0][name] + alone[1][name])


def test_the_loss_is_asked_with_averaged_gradients():
    model, batches = tiny_vit(), [(torch.randn(2, 3, 16, 16), torch.tensor([0, 1]))]

    def doubled(model):
        for parameter in model.parameters():
            parameter.grad.mul_(2)

    plain, averaged = taylor(model, batches), taylor(model, batches, doubled)
    for name, importance in plain.items():
        torch.testing.assert_close(averaged[name], 4 * importance)


def test_without_masked_image_modelling():
    supernet = make_supernet(mask_ratio_start=0.0, mask_ratio_end=0.0)
    images, targets = torch.randn(2, 3, 16, 16), torch.tensor([0, 1])
    losses = supernet.loss(images, targets)
    losses.total.backward()
    assert losses.reconstruction == 0 and supernet.masked_images is None
    expected = F.cross_entropy(supernet(images), targets, label_smoothing=0.1)
    torch.testing.assert_close(losses.classification, expected)


@pytest.mark.parametrize("name", ["lam_start", "lam_end", "mask_ratio_start", "mask_ratio_end"])
def test_shares_are_shares(name):
    with pytest.raises(ValueError, match=f"{name}: expected 0 to 1, got 1.5"):
        make_supernet(**{name: 1.5})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": "2%"}, r"target: expected between .* got .* \(2.0%\); choose one within"),
        ({"target": "150%"}, "target: expected between"),
        ({"target": "a lot"}, "target: expected MACs"),
        ({"target": {"params": "5M"}}, r"target: expected between .* K and .* K parameters .* got 5 M .*; choose"),
        (
            {"target": {}},
            "target: expected at least one of macs, params, latency_ms, got an empty mapping; name a cost",
        ),
        ({"target": {"flops": "50%"}}, "target: expected costs among macs, params, latency_ms, got 'flops'; rename"),
        ({"target": "macs=60%", "later_targets": ["params=30%"]}, "later_targets: expected the target's kinds of cost"),
        ({"epochs": 0}, "epochs: expected at least 1, got 0"),
        ({"steps_per_epoch": 0}, "steps_per_epoch: expected at least 1, got 0"),
        ({"residual_mask": "both"}, "residual_mask: expected one of stream, input, got 'both'"),
    ],
)
def test_bad_input(options, message):
    with pytest.raises(ValueError, match=message):
        make_supernet(**options)


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 10.0}, r"epochs: expected a whole number, got 10.0; round it, such as with int\(...\)"),
        *(
            ({name: wrong}, f"{name}: expected {expected}, got {wrong}")
            for name in ("one_hot_weight", "macs_weight", "score_penalty", "attention_score_penalty")
            for wrong, expected in ((-0.1, "at least 0"), (NAN, "a finite number"), (INF, "a finite number"))
        ),
        ({"prune_threshold": NAN}, "prune_threshold: expected a finite number, got nan"),
        ({"prune_threshold": -0.1}, "prune_threshold: expected at least 0 and less than 1, got -0.1"),
        ({"prune_threshold": 1.0}, "prune_threshold: expected at least 0 and less than 1, got 1.0"),
        ({"warmup_epochs": 5}, "warmup_epochs: expected 0 to 4, got 5"),
        ({"score_mean": NAN}, "score_mean: expected a finite number, got nan"),
        ({"mask_ratio_start": NAN}, "mask_ratio_start: expected a finite number, got nan"),
    ],
)
def test_numbers_out_of_range(options, message):
    """The model stays as it was, also where its tokens would be searched."""
    model = tiny_vit()
    before, modules = copy.deepcopy(model.state_dict()), list(model.modules())
    with pytest.raises(ValueError, match=f"^{message}"):
        Supernet(model, **{"epochs": 4, "steps_per_epoch": 6, "space": SearchSpace(tokens=True)} | options)
    assert list(model.modules()) == modules and model.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_budgets_that_contradict_each_other():
    """The smallest network is well below both, and the next larger ones are beyond one of them."""
    least = {kind: make_supernet(target={kind: "50%"}).reachable(kind)[0] for kind in ("macs", "params")}
    target = {"macs": 1.03 * least["macs"], "params": 1.03 * least["params"]}
    message = "no combination .* below all of .* MACs and .* parameters; relax or leave out one of them"
    with pytest.raises(ValueError, match=message):
        make_supernet(target=target)


def test_model_that_cannot_be_searched():
    with pytest.raises(ValueError, match="expected a timm VisionTransformer"):
        Supernet(timm.create_model("resnet18"))


def test_revision_tells_of_replaced_tensors():
    """As long as the revision stays, every tensor that a step reads or writes stays where it is."""
    supernet = Supernet(tiny_vit(), epochs=2, steps_per_epoch=6)
    optimizer = torch.optim.AdamW(supernet.parameter_groups(architecture_lr=5.0), lr=1e-3)

    def addresses():
        tensors = [*supernet.parameters(), *supernet.buffers()]
        return [tensor.data_ptr() for tensor in tensors] + [b.final for b in supernet.bimasks.values()]

    seen, changes = {}, 0
    for _ in range(12):
        supernet.loss(torch.randn(4, 3, 16, 16), torch.arange(4)).total.backward()
        optimizer.step()
        optimizer.zero_grad()
        supernet.step(optimizer)
        changes += supernet.revision not in seen and bool(seen)
        assert addresses() == seen.setdefault(supernet.revision, addresses())
    assert changes >= 2 and supernet.finished
