"""The number of patches as a submodule: masked, counted, pruned, folded, saved, searched."""

import copy
import itertools

import pytest
import torch

import ofb
from ofb.supernet import SearchSpace
from ofb.supernet.budget import TOLERANCE
from ofb.supernet.families import count_macs
from ofb.supernet.families.tokens import kept_patches, search_tokens
from tests.common import tiny_swin, tiny_vit
from tests.test_cost import counted_by_torch
from tests.test_supernet import RESIDUAL_MASKS, kill_units, make_batch, make_supernet, train

TOKENS = SearchSpace(tokens=True)
MODELS = {
    "class token": ("vit_tiny_patch16_224", {}),
    "distilled": ("deit_tiny_distilled_patch16_224", {}),
    "registers": ("vit_tiny_patch16_224", {"reg_tokens": 3, "no_embed_class": True}),
    "average": ("vit_tiny_patch16_224", {"global_pool": "avg", "class_token": False}),
    "average with prefix": ("vit_tiny_patch16_224", {"global_pool": "avg", "pool_include_prefix": True}),
    "qk norm": ("vit_tiny_patch16_224", {"qk_norm": True}),
    "layer scale": ("vit_tiny_patch16_224", {"init_values": 0.3}),
}


def make_token_supernet(kind="class token", **options):
    name, model_options = MODELS[kind]
    return make_supernet(name, model_options=model_options, **({"space": TOKENS} | options))


def test_off_by_default():
    assert "tokens" not in make_supernet().bimasks
    assert "tokens" in make_token_supernet().bimasks


def test_candidates_are_the_papers_shares_whatever_rounding():
    assert make_token_supernet().bimasks["tokens"].candidates.channels == (8, 10, 12, 14, 16)


@pytest.mark.parametrize("kind", MODELS)
def test_untouched_it_computes_the_dense_network(kind):
    supernet = make_token_supernet(kind, lam_start=0.0, residual_mask="input", target="90%").eval()
    with torch.no_grad():
        for bimask in supernet.bimasks.values():
            bimask.alpha.copy_(torch.where(bimask.holds(*bimask.candidates.full), 50.0, -50.0))
    images, _ = make_batch()
    torch.testing.assert_close(supernet(images), supernet.model(images), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("residual_mask", RESIDUAL_MASKS)
@pytest.mark.parametrize("kind", MODELS)
def test_pruning_keeps_the_function_up_to_the_removed_positions(kind, residual_mask):
    # Without masks in the stream, removing channels of the residual width is a jump.
    space = SearchSpace(tokens=True, freeze=() if residual_mask == "stream" else ("embed",))
    supernet = make_token_supernet(kind, dtype=torch.float64, residual_mask=residual_mask, space=space).eval()
    survivors = kill_units(supernet)
    images, _ = make_batch(dtype=torch.float64)
    before = supernet(images)
    for name, alive in survivors.items():
        if name != "embed" or residual_mask == "stream":
            supernet._keep_candidates(name, alive, None, "pruned")
    assert len(kept_patches(supernet.model).positions) == 12
    torch.testing.assert_close(supernet(images), before, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", ["class token", "average"])
def test_a_weighted_position_counts_in_softmax_and_average_as_so_much_of_a_token(kind):
    """Two patches of weight ½ that hold the same token do what one of full weight does."""
    supernet = make_token_supernet(kind, dtype=torch.float64, residual_mask="input").eval()
    masks = {name: torch.ones(each.candidates.full).double() for name, each in supernet.bimasks.items()}
    kept = kept_patches(supernet.model)
    halves = torch.ones(16, dtype=torch.float64)
    halves[[3, 7]] = 0.5
    with torch.no_grad():
        kept.positions[7] = 3
        patches = supernet.family.patch_embeddings(supernet.model, make_batch(dtype=torch.float64)[0])

        def logits(norm_masks):
            tokens = supernet.family.features(supernet.model, patches, masks, {}, norm_masks)
            return supernet.family.logits(supernet.model, tokens, masks, {}, norm_masks)

        got = logits({"tokens": halves})
        kept.positions = kept.positions[torch.arange(16) != 7]
        kept.weight = torch.nn.Parameter(torch.ones(15).double())
        masks["tokens"] = masks["tokens"][:, :15]
        torch.testing.assert_close(got, logits({}), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", MODELS)
def test_search_ends_on_target_folds_and_survives_saving(kind, tmp_path):
    supernet = make_token_supernet(kind, target="40%")
    train(supernet, 24)
    assert supernet.finished and supernet.choices
    extracted = supernet.extract().eval()
    assert (1 - TOLERANCE) * supernet.target_macs <= count_macs(extracted) <= supernet.target_macs
    positions = kept_patches(extracted).positions
    assert positions.diff().min() >= 1 and len(positions) == supernet.bimasks["tokens"].candidates.units
    images, _ = make_batch()
    with torch.no_grad():
        expected, got = supernet.eval()(images), extracted(images)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    ofb.save(extracted, tmp_path)
    again = ofb.load(tmp_path)
    with torch.no_grad():
        assert torch.equal(again(images), got)
        features = again.forward_intermediates(images, indices=1, output_fmt="NLC", intermediates_only=True)
    assert features[0].shape == (8, len(positions), again.embed_dim)
    program = torch.export.export(again, (images,))
    torch.testing.assert_close(program.module()(images), got)


def test_what_it_found_can_be_searched_again_with_and_without_tokens():
    supernet = make_token_supernet(target="50%")
    train(supernet, 24)
    found = supernet.extract()
    patches = len(kept_patches(found).positions)
    for space in (TOKENS, SearchSpace()):
        again = ofb.Supernet(copy.deepcopy(found), "80%", epochs=4, steps_per_epoch=6, space=space)
        assert again.bimasks["tokens"].final == (not space.tokens or patches == 8)
        train(again, 24)
        assert again.finished
        assert (1 - TOLERANCE) * again.target_macs <= count_macs(again.extract()) <= again.target_macs


@pytest.mark.parametrize("kind", ["class token", "distilled", "average"])
def test_macs_and_parameters_are_exact_at_every_number_of_patches(kind):
    name, options = MODELS[kind]
    supernet = make_token_supernet(kind, target={"macs": "60%", "params": "80%"})
    widest = {name: each.candidates.full for name, each in supernet.bimasks.items()}
    for patches in (8, 12, 16):
        supernet = make_token_supernet(kind, target={"macs": "90%", "params": "99%"})
        alive = supernet.bimasks["tokens"].holds(1, patches)
        supernet._keep_candidates("tokens", alive, None, "pruned")
        model = supernet.model
        sizes = widest | {"tokens": (1, patches)}
        with torch.device("meta"):
            dense = tiny_vit(name, **options)
            search_tokens(dense)
            kept = kept_patches(dense)
            kept.positions, kept.weight = kept.positions[:patches], torch.nn.Parameter(kept.weight[:patches])
        assert supernet.costs["macs"].total(sizes) == count_macs(model) == counted_by_torch(dense)
        assert supernet.costs["params"].total(sizes) == sum(p.numel() for p in model.parameters())


def test_expected_macs_are_exact_in_p():
    space = SearchSpace(tokens=True, freeze=("embed", "attn*", "mlp1"))
    supernet = make_supernet(space=space, dtype=torch.float64, target="70%")
    tokens, mlp = supernet.bimasks["tokens"], supernet.bimasks["mlp0"]
    with torch.no_grad():
        tokens.alpha.normal_()
        mlp.alpha.normal_()
    frozen = {name: each.candidates.full for name, each in supernet.bimasks.items()}
    expected = sum(
        p * q * supernet.costs["macs"].total(frozen | {"tokens": size, "mlp0": hidden})
        for (size, p), (hidden, q) in itertools.product(
            tokens.sizes(tokens.alive).items(), mlp.sizes(mlp.alive).items()
        )
    )
    assert supernet.expected_macs() == pytest.approx(expected, rel=1e-5)
    supernet.loss(*make_batch(dtype=torch.float64)).total.backward()
    assert tokens.alpha.grad.abs().max() > 0 and tokens.score.grad.abs().max() > 0


def test_masked_patches_are_kept_ones_and_rebuilt_at_their_own_place(monkeypatch):
    supernet = make_token_supernet().eval()
    alive = supernet.bimasks["tokens"].holds(1, 8)
    supernet._keep_candidates("tokens", alive, None, "pruned")
    positions = kept_patches(supernet.model).positions
    assert len(positions) == 8 and positions.max() > 7
    seen = {}

    def compare(decoded, images, areas, masked, pixels):
        seen["areas"] = areas
        return decoded.sum()

    def embed(embeddings, area, areas, masked, token):
        seen["hidden"] = areas
        return embeddings

    monkeypatch.setattr("ofb.supernet.masked_images.masked_reconstruction_loss", compare)
    monkeypatch.setattr("ofb.supernet.masked_images.replace_patches", embed)
    supernet.loss(*make_batch())
    assert torch.equal(seen["areas"], seen["hidden"])
    assert set(seen["areas"].flatten().tolist()) <= set(positions.tolist())


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_backends_agree(backend, device):
    exact = make_token_supernet(device=device, dtype=torch.float64, mask_ratio_start=0.0, mask_ratio_end=0.0)
    other = make_token_supernet(device=device, backend=backend, mask_ratio_start=0.0, mask_ratio_end=0.0)
    other.load_state_dict(exact.state_dict())
    images, targets = make_batch(device)
    expected, got = exact.loss(images.double(), targets), other.loss(images, targets)
    assert got.total.item() == pytest.approx(expected.total.item(), rel=1e-4)
    expected.total.backward()
    got.total.backward()
    for name in ("score", "alpha"):
        gradients = [getattr(each.bimasks["tokens"], name).grad.double() for each in (exact, other)]
        torch.testing.assert_close(*gradients[::-1], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("steps", [3, 13, 24])
def test_state_is_saved_and_loaded(steps):
    supernet, again = make_token_supernet(), make_token_supernet()
    train(supernet, steps)
    again.load_state_dict(supernet.state_dict())
    assert torch.equal(kept_patches(again.model).positions, kept_patches(supernet.model).positions)
    images, _ = make_batch()
    assert torch.equal(supernet.eval()(images), again.eval()(images))


def test_taylor_ranks_positions_the_loss_depends_on_first():
    supernet = make_token_supernet()
    images, targets = make_batch(size=16)
    with torch.no_grad():
        # Tokens that are 0 where they enter the blocks: the loss does not change with their gain.
        supernet.model.pos_embed[:, 1 + torch.tensor([2, 5, 11])] = 0
        supernet.model.patch_embed.proj.bias.zero_()
    images = images.unflatten(2, (4, 4)).unflatten(4, (4, 4))
    for patch in (2, 5, 11):
        images[:, :, patch // 4, :, patch % 4] = 0
    supernet.rank_scores([(images.flatten(4).flatten(2, 3), targets)])
    assert set(supernet.bimasks["tokens"].score.argsort()[:3].tolist()) == {2, 5, 11}


def test_equally_important_units_are_ranked_at_random():
    orders = set()
    for seed in range(4):
        torch.manual_seed(seed)
        orders.add(tuple(make_token_supernet().bimasks["tokens"].score.argsort().tolist()))
    assert len(orders) == 4


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (tiny_swin(), "expected a timm VisionTransformer, got SwinTransformer"),
        (tiny_vit("vit_tiny_patch16_224", dynamic_img_size=True), "dynamic_img_size"),
        (tiny_vit("vit_base_patch16_clip_224"), "pre_norm"),
        (tiny_vit("vit_base_patch16_siglip_224", num_heads=4), "expected global_pool token or avg, got 'map'"),
        (tiny_vit("eva02_tiny_patch14_224"), "expected a timm VisionTransformer, got Eva"),
    ],
    ids=["swin", "dynamic", "pre_norm", "map", "eva"],
)
def test_models_that_need_all_their_patches_say_so(model, reason):
    with pytest.raises(ValueError, match=f"tokens: the number of patches cannot be searched: .*{reason}"):
        ofb.Supernet(model, "50%", space=TOKENS)


def test_latency_and_tokens_are_refused_together():
    with pytest.raises(ValueError, match="tokens: expected a target of macs or params"):
        make_token_supernet(target={"latency_ms": "50%"})


def test_damaged_number_of_patches(tmp_path):
    import json

    supernet = make_token_supernet()
    ofb.save(supernet.extract(), tmp_path)
    path = tmp_path / "config.json"
    for wrong in (0, 17, "8", 1.5, -3):
        config = json.loads(path.read_text())
        config["model_args"]["network"]["kept_patches"] = wrong
        path.write_text(json.dumps(config))
        with pytest.raises(ValueError, match="is damaged"):
            ofb.load(tmp_path)
