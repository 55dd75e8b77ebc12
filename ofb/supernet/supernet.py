"""Supernet: a timm ViT, Eva or Swin with bi-masks on it, searched while it trains (OFB, CVPR 2024)."""

import copy
import dataclasses
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from types import ModuleType, SimpleNamespace
from typing import Union

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ofb.checks import at_least, between, finite
from ofb.supernet import decisions, ranking
from ofb.supernet.bimask import ARCHITECTURE_INITS, BiMask
from ofb.supernet.budget import check_targets, reachable
from ofb.supernet.cost_kinds import costs_of
from ofb.supernet.equivalence import check_equivalence
from ofb.supernet.families import FAMILIES, check_searchable, family_of
from ofb.supernet.families.tokens import kept_patches, search_tokens
from ofb.supernet.goals import Goals
from ofb.supernet.latency import LatencyTable
from ofb.supernet.losses import Criterion, Losses
from ofb.supernet.masked_images import MaskedImages
from ofb.supernet.parameter_groups import parameter_groups
from ofb.supernet.pruning import Coupling, check_moments, keep_units
from ofb.supernet.schedules import Course
from ofb.supernet.search_space import TOKENS, SearchSpace, Size
from ofb.supernet.stack import Joined, Stacks
from ofb.supernet.targets import Limits, Target, amounts, parse_target
from ofb_kernels import use_backend
from ofb_kernels.casts import Casts
from ofb_kernels.reference import one_hotness

RESIDUAL_MASKS = ("stream", "input")
SCORE_INITS = ("taylor", "magnitude", "random")
COUNTS = ("head_counts", "channel_counts")
STATE_BYTES = 256  # for the choice of a submodule
Copies = Union["Supernet", Iterable["Supernet"]]
AllMasks = tuple[Mapping[str, Tensor], Mapping[str, Tensor], Mapping[str, Tensor]]


class Supernet(nn.Module):
    """A timm model whose residual width, attention heads and channels, and hidden channels are searched.

    The defaults are those that found the best networks in benchmarks/QUALITY.md, but for `space`, whose sizes are
    rounded to suit hardware; the paper's own values are in `ofb.engine.presets`.

    Use it like a model: `loss(...)`, backward, `optimizer.step()`, then `step(optimizer)`; at the end `extract()`.

    Args:
        model: a timm model that `ofb.supports`; taken over, not copied.
        target: cost of the network to find: "50%" or 0.5 of the dense MACs, "1.1G" or a number of them; or
            {"params": "5M"}, {"latency_ms": 2.5}; or several budgets to keep within, {"macs": "50%", "params": "40%"}.
        later_targets: ever smaller ones, of the same kinds of cost, that the search goes on to, each with
            `next_target()`.
        space: what you want of the candidate sizes; the defaults of `SearchSpace` if None.
        epochs: length of the search.
        steps_per_epoch: optimizer steps in an epoch (the default is ImageNet-1K at batch 1024).
        warmup_epochs: epochs over which λ falls and the share of masked patches grows; a fifth of `epochs` if None.
        residual_mask: "stream" masks whatever enters the residual stream and weighs LayerNorm by V; "input" masks the
            embedding only, as the released code does.
        lam_start, lam_end: λ, the share of the importance in a mask, at step 0 and after the warm-up.
        mask_ratio_start, mask_ratio_end: share of the patches that are masked and rebuilt, at step 0 and after the
            warm-up; both 0 leave masked image modelling out.
        score_init: who gets the largest of the random initial scores: "magnitude", the units of largest weights;
            "taylor" the same, until `rank_scores(batches)` asks the loss; "random", as they fall.
        score_mean: where the importance logits start; S starts at sigmoid(score_mean).
        architecture_init: "full", larger candidate sizes start likelier, so that the masks start near 1; "equal", all
            start alike; "random", with logits from U(0, 1).
        criterion: the classification loss, distilled or not; cross entropy with label smoothing 0.1 if None. A model
            without a classifier needs one.
        one_hot_weight, macs_weight: weights of these losses; the second is of all budgets, MACs or others.
        one_hot_delay: share of the search before the one-hot loss sets in. It sharpens whatever difference there is, so
            the classification loss should have made one.
        pace: share of the search over which the loss of the budgets lowers its goal from the dense network's cost to
            the final one, before any candidate may die; 0 asks for the final one from the first step.
        settling: share of the search at its end over which ever more candidates are dropped, so that no size is left
            open; 0 leaves it to the one-hot loss.
        score_penalty, attention_score_penalty: weights of Σ S in the one-hot loss.
        prunes_per_epoch: pruning events in an epoch.
        prune_threshold: a candidate dies at p ≤ prune_threshold / n, with n candidates alive.
        latency_table: for a target of latency, what `ofb.measure_latency` gave on the device that matters; if None, it
            is measured now, for one image on the model's device.
        backend: backend of all ops, None for the package's choice.
        verify: whether to make sure, on two random images, that the supernet computes what the model does while all
            masks are one.

    Raises:
        ValueError: the model cannot be searched, the target is out of reach, or an argument is out of range.
    """

    def __init__(
        self,
        model: nn.Module,
        target: Target = "50%",
        *,
        later_targets: Sequence[Target] = (),
        space: SearchSpace | None = None,
        epochs: int = 100,
        steps_per_epoch: int = 1251,
        warmup_epochs: float | None = None,
        residual_mask: str = "stream",
        lam_start: float = 0.99,
        lam_end: float = 0.1,
        mask_ratio_start: float = 0.0,
        mask_ratio_end: float = 0.0,
        score_init: str = "magnitude",
        score_mean: float = 4.0,
        architecture_init: str = "full",
        criterion: Criterion | None = None,
        one_hot_weight: float = 0.05,
        one_hot_delay: float = 0.5,
        macs_weight: float = 100.0,
        pace: float = 0.3,
        settling: float = 0.4,
        score_penalty: float = 1e-4,
        attention_score_penalty: float = 4e-4,
        prunes_per_epoch: int = 3,
        prune_threshold: float = 0.2,
        latency_table: LatencyTable | None = None,
        backend: str | None = None,
        verify: bool = True,
    ) -> None:
        super().__init__()
        targets = (target, *later_targets)
        self.course = Course(
            epochs=epochs,
            steps_per_epoch=steps_per_epoch,
            targets=len(targets),
            warmup_epochs=warmup_epochs,
            lam_start=lam_start,
            lam_end=lam_end,
            mask_ratio_start=mask_ratio_start,
            mask_ratio_end=mask_ratio_end,
            one_hot_delay=one_hot_delay,
            pace=pace,
            settling=settling,
            prunes_per_epoch=prunes_per_epoch,
        )
        numbers = SimpleNamespace(
            one_hot_weight=one_hot_weight,
            macs_weight=macs_weight,
            score_penalty=score_penalty,
            attention_score_penalty=attention_score_penalty,
            prune_threshold=prune_threshold,
            score_mean=score_mean,
        )
        finite(numbers, *vars(numbers))
        at_least(numbers, 0, "one_hot_weight", "macs_weight", "score_penalty", "attention_score_penalty")
        between(numbers, 0, 1, "prune_threshold")
        choices = {
            "residual_mask": (residual_mask, RESIDUAL_MASKS),
            "score_init": (score_init, SCORE_INITS),
            "architecture_init": (architecture_init, ARCHITECTURE_INITS),
        }
        for name, (value, expected) in choices.items():
            if value not in expected:
                raise ValueError(f"{name}: expected one of {', '.join(expected)}, got {value!r}")
        if getattr(model, "num_classes", 1) == 0 and criterion is None:
            raise ValueError(
                "criterion: expected one of your own for a model without a classifier (num_classes=0), got None; "
                "it is given what the model returns"
            )
        check_searchable(model)
        self.model, space = model, space or SearchSpace()
        self.family_name = family_of(model).NAME
        if space.tokens:
            search_tokens(model)
        self.residual_mask = residual_mask
        self.criterion = criterion or Criterion()
        self.one_hot_weight, self.macs_weight = one_hot_weight, macs_weight
        self.score_penalties = {"attention": attention_score_penalty, "others": score_penalty}
        self.prune_threshold, self.backend, self.casts = prune_threshold, backend, Casts()
        self.searches_tokens = space.tokens

        submodules = self.family.submodules(model)
        weight = next(model.parameters())
        like = {"device": weight.device, "dtype": weight.dtype}
        self.macs = self.family.macs(model)
        self.normed = {name for name, submodule in submodules.items() if submodule.normed}
        full = {name: submodule.candidates.full for name, submodule in submodules.items()}
        candidates = space.narrow({name: submodule.candidates for name, submodule in submodules.items()})
        patches = candidates[TOKENS].channels if space.tokens else ()
        self.costs = costs_of(model, {"macs"}.union(*map(amounts, targets)), latency_table, patches)
        self.dense_costs = {kind: cost.total(full) for kind, cost in self.costs.items()}
        self.targets = [parse_target(each, self.dense_costs) for each in targets]
        self.targets_passed = 0
        self.bimasks = nn.ModuleDict(
            {name: BiMask(each, score_mean, architecture_init, **like) for name, each in candidates.items()}
        )
        self.score_init = score_init
        if score_init != "random":
            for name, importance in ranking.magnitudes(model).items():
                self.bimasks[name].rank_scores_by(importance)
        first, last = (submodules[width].candidates.units for width in (self.macs.widths[0], self.macs.widths[-1]))
        self.masked_images = None
        if self.course.most_masked:
            area, in_chans = self.family.token_area(model), model.patch_embed.proj.in_channels
            self.masked_images = MaskedImages(area, in_chans, first, last, self.course.most_masked, **like)
        self.couplings = {name: self._couplings(name, s.couplings) for name, s in submodules.items()}
        self.register_buffer("lam", torch.zeros((), **like), persistent=False)
        self.register_buffer("mask_ratio", torch.zeros((), **like), persistent=False)
        self.register_buffer("one_hot_factor", torch.zeros((), device=weight.device), persistent=False)
        self.revision = 0  # of the tensors behind the step: whoever holds on to them looks here
        self._build_stacks()
        check_targets(self.costs, decisions.options(self.bimasks), self.targets)
        self.goals = Goals(self.costs, self.dense_costs, self.targets, self.stacks.names, weight.device)
        self.steps = 0
        self.choices: list[dict] = []
        self._set_schedules()
        if verify:
            check_equivalence(model, self.family, full, self._norm_masks().keys())

    @property
    def family(self) -> ModuleType:
        return FAMILIES[self.family_name]

    @property
    def total_steps(self) -> int:
        """Length of the search."""
        return self.course.total_steps

    @property
    def target(self) -> Limits:
        """Limit of each kind of cost in the target the search is on its way to."""
        return self.targets[self.targets_passed]

    @property
    def dense_macs(self) -> int:
        """MACs of the dense network."""
        return self.dense_costs["macs"]

    @property
    def target_macs(self) -> int | None:
        """The limit of MACs the search is on its way to; None where the target limits others alone."""
        return self.target.get("macs")

    # ---- the forward pass and its losses ----

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, classes) of the masked network, no patch replaced."""
        with self._backend(), self._casts_at_once():
            patches = self.family.patch_embeddings(self.model, images)
            return self._logits(patches, self._all_masks())

    def loss(self, images: Tensor, targets: Tensor, teacher_logits: Tensor | None = None) -> Losses:
        """All losses of a search step from one forward pass.

        L = L_cls + one_hot_weight · Σ L_one_hot + macs_weight · L_macs + sg(L_cls / L_rec) · L_rec; once every size
        is final, L_cls alone.

        Args:
            images: (B, C, H, W).
            targets: class indices (B,), or probabilities (B, classes) after mixup.
            teacher_logits: (B, classes), for a criterion that distils.
        """
        if self.finished:
            classification = self.criterion(self(images), targets, teacher_logits)
            zero = torch.zeros_like(classification)
            return Losses(classification, classification.detach(), zero, zero, zero)
        with self._backend(), self._casts_at_once():
            joined = self.stacks.join()
            logits, rebuilt = self._logits_and_reconstruction(images, self._all_masks(joined))
            one_hot, sizes = self._statistics(joined)
            macs = self.goals(*sizes)
        classification = self.criterion(logits, targets, teacher_logits)
        balance = (classification / rebuilt.clamp(min=1e-6)).detach()
        total = torch.addcmul(classification, self.one_hot_factor, one_hot)
        total = torch.addcmul(total.add(macs, alpha=self.macs_weight), balance, rebuilt)
        return Losses(total, classification.detach(), one_hot.detach(), macs.detach(), rebuilt.detach())

    # ---- the course of the search ----

    def rank_scores(
        self, batches: Iterable[tuple[Tensor, Tensor]], average: Callable[[nn.Module], None] = lambda model: None
    ) -> None:
        """Before the first step: the largest initial scores go to the units that the loss depends on most.

        Importance of a unit is the sum over its weights and the batches of (w · ∂L/∂w)², L the cross entropy of the
        dense network; the weights stay as they are.

        Args:
            batches: images (B, C, H, W) and targets, class indices (B,) or probabilities (B, classes).
            average: where each of several processes sees a share of a batch, makes the model's gradients those of the
                whole batch.
        """
        for name, importance in ranking.taylor(self.model, batches, average).items():
            self.bimasks[name].rank_scores_by(importance)

    @property
    def finished(self) -> bool:
        """Whether every submodule's size is final."""
        return all(bimask.final for bimask in self.bimasks.values())

    def step(self, optimizer: Optimizer | None = None, copies: Copies = ()) -> bool:
        """Advance the schedules after an optimizer step, and prune when it is time.

        After the last step all sizes are final. No host synchronization but at pruning events.

        Args:
            optimizer: its moments follow the parameters' shapes; None where none holds any.
            copies: a supernet made as a copy of this one, such as the `module` of a weight average, or several; they
                go the same way: their schedules are advanced, the same units removed.

        Returns:
            Whether there was a pruning event.

        Raises:
            ValueError: what the optimizer keeps cannot follow, which is said after its first step; scores or
                architecture logits are not finite at a pruning event; `next_target()` was not called in time; or a copy
                is none. Nothing has been changed then.
        """
        copies = self._checked_copies(copies)
        step = self.steps + 1
        prunes = ends = False
        if not self.finished:
            self.course.check_target(step, self.targets_passed)
            prunes, ends = self.course.prunes_after(step, self.targets_passed), step >= self.total_steps
        if prunes or ends:
            self._check_state(optimizer)
        elif step == 1:
            check_moments(self.parameters(), optimizer)
        for each in (self, *copies):
            each.steps, each.targets_passed = step, self.targets_passed
            each._set_schedules()
        if prunes:
            self.prune(optimizer, copies)
        if ends:
            self.finalize(optimizer, copies)
        return prunes or ends

    def next_target(self) -> None:
        """Go on to the next of the later targets; `extract()` before gives the network of this one.

        Raises:
            ValueError: no target is left, or no size is open.
        """
        if self.targets_passed + 1 == len(self.targets):
            raise ValueError(
                f"next_target: expected one of {len(self.targets) - 1} later_targets to be left, got none; leave this "
                "call out after the last one"
            )
        if self.finished:
            raise ValueError(
                "next_target: expected sizes that are open, got a search that is over; call it before finalize()"
            )
        self.targets_passed += 1
        self._set_schedules()

    def prune(self, optimizer: Optimizer | None = None, copies: Copies = ()) -> None:
        """Drop unlikely candidates and the units beyond the largest ones left (`decisions.survivors`)."""
        copies = self._checked_copies(copies)
        self._check_state(optimizer)
        surviving = decisions.survivors(
            self.bimasks,
            self.costs,
            self.targets[self.targets_passed :],
            self.prune_threshold,
            self.course.events_left(self.steps, self.targets_passed),
        )
        for name, bimask in self.bimasks.items():
            if bimask.oversized or not torch.equal(bimask.alive, surviving[name]):
                self._keep_candidates(name, surviving[name], optimizer, "pruned", copies)

    def finalize(self, optimizer: Optimizer | None = None, copies: Copies = ()) -> None:
        """Fix every open size: the combination of greatest Σ log p, over what is alive, that meets the target."""
        copies = self._checked_copies(copies)
        self._check_state(optimizer)
        chosen = decisions.choose(self.bimasks, self.costs, self.target)
        for name, bimask in self.bimasks.items():
            if not bimask.final:
                self._keep_candidates(name, bimask.holds(*chosen[name]), optimizer, "chosen", copies)

    @torch.no_grad()
    def extract(self) -> nn.Module:
        """The found network as a plain timm module, masks folded into its weights; it needs this package no more.

        An unfinished search is finalized on a copy; the supernet itself stays as it is.
        """
        if not self.finished:
            copied = copy.deepcopy(self)
            copied.finalize()
            return copied.extract()
        model = copy.deepcopy(self.model)
        masks = self._masks()
        self.family.fold(model, masks, self._residual_masks(masks))
        return model

    # ---- figures, each read from the device ----

    def reachable(self, kind: str = "macs") -> tuple[float, float]:
        """Least and greatest cost, of a kind that the target limits or of MACs, that the candidates alive allow."""
        return reachable(self.costs[kind], decisions.options(self.bimasks))

    @torch.no_grad()
    def expected_costs(self) -> dict[str, float]:
        """F(p), the expected cost of the network, of each kind that the target limits and of MACs."""
        return {kind: float(cost) for kind, cost in self.goals.expected(*self._statistics()[1]).items()}

    def expected_macs(self) -> float:
        """F(p), the expected MACs of the network."""
        return self.expected_costs()["macs"]

    @torch.no_grad()
    def decided(self) -> float:
        """How near the probabilities of the sizes are to one-hot, the mean of σ over the submodules: from 0, all sizes
        equally likely, to 1, every size final."""
        bimasks = self.bimasks.values()
        open_ones = [(each.probabilities().flatten(), each.alive.flatten()) for each in bimasks if not each.final]
        sigmas = [float(one_hotness(p[None], alive[None])) for p, alive in open_ones]
        return (sum(sigmas) + len(bimasks) - len(sigmas)) / len(bimasks)

    def alive_candidates(self) -> dict[str, int]:
        """How many candidates each submodule has left."""
        return {name: int(bimask.alive.sum()) for name, bimask in self.bimasks.items()}

    @torch.no_grad()
    def reconstruct(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Pictures (B, C, H, W) of masked image modelling on images (B, C, H, W), the present share of patches hidden:
        what there is to rebuild, what is left of it, and what was rebuilt.

        Raises:
            ValueError: masked image modelling is off.
        """
        if self.masked_images is None:
            raise ValueError("reconstruct: expected a supernet with masked image modelling, got mask_ratio_end=0")
        with self._backend(), self._casts_at_once():
            tokens, _, *places = self._hidden_tokens(images, self._all_masks())
            return self.masked_images.pictures(tokens, images, *places)

    def parameter_groups(
        self, weight_decay: float = 1e-3, architecture_lr: float | None = None, score_lr: float | None = None
    ) -> list[dict]:
        """Parameter groups for a torch optimizer: decayed weights, the rest, scores, and the architecture logits.

        Args:
            weight_decay: on matrices; biases, norms, tokens, scores and scales have none.
            architecture_lr, score_lr: learning rates of the logits and of the scores. Adam carries a logit about as far
                as learning rate × steps; if None they are such that this is `parameter_groups.TRAVEL`, however long the
                search.
        """
        rates = {"architecture": architecture_lr, "score": score_lr}
        return parameter_groups(self.named_parameters(), weight_decay, rates, self.total_steps)

    # ---- saving and loading ----

    def get_extra_state(self) -> Tensor:
        """What is no tensor, as the bytes of its JSON, always as many: a state of tensors alone can be averaged."""
        state = {"steps": self.steps, "targets_passed": self.targets_passed, "choices": self.choices}
        text = json.dumps(state).ljust(STATE_BYTES * (1 + len(self.bimasks)))
        return torch.tensor(list(text.encode()), dtype=torch.uint8)

    def set_extra_state(self, state: Tensor) -> None:
        saved = json.loads(bytes(state.tolist()))
        self.steps, self.targets_passed, self.choices = saved["steps"], saved["targets_passed"], saved["choices"]

    def load_state_dict(self, state_dict: Mapping, strict: bool = True, assign: bool = False):
        """Load a state, first cutting this supernet to the sizes it had when the state was saved.

        Raises:
            ValueError: it lacks sizes, or has others than this supernet's; nothing has been changed then.
        """
        self._check_sizes(state_dict)
        for name, bimask in self.bimasks.items():
            saved = {kind: state_dict[f"bimasks.{name}.{kind}"] for kind in ("alive", *COUNTS)}
            size = (int(saved["head_counts"][-1]), int(saved["channel_counts"][-1]))
            rows, columns = saved["alive"].shape
            alive = torch.zeros_like(bimask.alive)
            alive[:rows, :columns] = saved["alive"]
            if size != bimask.candidates.full or not torch.equal(alive, bimask.alive):
                self._cut(name, alive, *bimask.units_kept_by(alive), optimizer=None)
        result = super().load_state_dict(state_dict, strict, assign)
        for bimask in self.bimasks.values():
            bimask.refresh()
        self._build_stacks()
        self._set_schedules()
        return result

    # ---- parts ----

    def _logits_and_reconstruction(self, images: Tensor, all_masks: AllMasks) -> tuple[Tensor, Tensor]:
        """Logits (B, classes) with the present share of patches masked, and the loss of rebuilding these, 0-d."""
        if self.masked_images is None:
            logits = self._logits(self.family.patch_embeddings(self.model, images), all_masks)
            return logits, logits.new_zeros((), dtype=torch.float32)
        tokens, logits, *places = self._hidden_tokens(images, all_masks)
        return logits, self.masked_images.loss(tokens, images, *places)

    def _hidden_tokens(
        self, images: Tensor, all_masks: AllMasks
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
        """Patch tokens (B, N, D) and logits (B, classes) with the present share of patches hidden; which are drawn and
        masked, and the positions of the tokens."""
        embeddings = self.family.patch_embeddings(self.model, images)  # (B, P, D)
        kept = kept_patches(self.model)
        positions = None if kept is None else kept.positions
        hidden, drawn, masked = self.masked_images.hide(embeddings, self.mask_ratio, positions)
        tokens = self.family.features(self.model, hidden, *all_masks)
        pooled, patches = self.family.split_tokens(self.model, tokens)
        return patches, self.family.logits(self.model, pooled, *all_masks), drawn, masked, positions

    def _logits(self, patches: Tensor, all_masks: AllMasks) -> Tensor:
        """(B, classes) from patch embeddings (B, patches, D)."""
        return self.family.logits(self.model, self.family.features(self.model, patches, *all_masks), *all_masks)

    def _all_masks(self, joined: Joined | None = None) -> AllMasks:
        """What the family multiplies in: masks, residual masks and norm masks."""
        masks = self._masks(joined)
        return masks, self._residual_masks(masks), self._norm_masks(joined)

    def _masks(self, joined: Joined | None = None) -> dict[str, Tensor]:
        if self.finished:
            return {name: bimask.mask(self.lam) for name, bimask in self.bimasks.items()}
        return self.stacks.masks(self.lam, joined)

    def _residual_masks(self, masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """m (D,) of each residual width, with which the blocks' outputs are masked; empty where they are not."""
        return {width: masks[width].flatten() for width in self.macs.widths} if self.residual_mask == "stream" else {}

    def _norm_masks(self, joined: Joined | None = None) -> dict[str, Tensor]:
        """V, flat, of the open submodules that a norm weighs: widths, and those with a norm inside their block."""
        widths = self.macs.widths if self.residual_mask == "stream" else ()
        sparsity = {name: self.bimasks[name].sparsity() for name in widths}
        sparsity |= self.stacks.masks(torch.zeros_like(self.lam), joined, self.normed) if self.normed else {}
        return {name: v.flatten() for name, v in sparsity.items() if not self.bimasks[name].final}

    def _statistics(self, joined: Joined | None = None) -> tuple[Tensor, list[Tensor]]:
        """One-hot loss, 0-d; expected heads (S,) and units (S,) of all submodules, and the probabilities of the numbers
        of patches (K,) where these are searched."""
        one_hot, *sizes = self.stacks.statistics(joined)
        if self.searches_tokens:
            sizes.append(self.bimasks[TOKENS].probabilities().flatten())
        return one_hot, sizes

    def _check_state(self, optimizer: Optimizer | None) -> None:
        """Make sure that units can be removed, before any is."""
        check_moments(self.parameters(), optimizer)
        decisions.check_finite(self.bimasks)

    def _check_sizes(self, state_dict: Mapping) -> None:
        """Make sure that a state is of such a supernet, as it is now or smaller."""
        counts = {f"bimasks.{name}.{kind}": getattr(b, kind) for name, b in self.bimasks.items() for kind in COUNTS}
        others = [key for key, ours in counts.items() if not _begins_alike(state_dict.get(key), ours)]
        if not isinstance(state_dict.get("_extra_state"), Tensor):
            others.append("_extra_state")
        if others:
            raise ValueError(
                "state_dict: expected the state_dict() of a supernet over the same model, saved by this version, got "
                f"another {others[0]} or none; make the supernet as it was made then"
            )

    def _checked_copies(self, copies: Copies) -> tuple["Supernet", ...]:
        copies = (copies,) if isinstance(copies, nn.Module) else tuple(copies)
        sizes = {name: bimask.candidates for name, bimask in self.bimasks.items()}
        for each in copies:
            if not isinstance(each, Supernet):
                got = type(each).__name__
                raise ValueError(f"copies: expected supernets, such as the `module` of an AveragedModel, got {got}")
            if {name: bimask.candidates for name, bimask in each.bimasks.items()} != sizes:
                raise ValueError(
                    "copies: expected supernets with the sizes of this one, got others; give them to every step() from "
                    "the one after they were made"
                )
        return copies

    def _build_stacks(self) -> None:
        self.revision += 1
        self.stacks = Stacks(self.bimasks, self.score_penalties)

    def _set_schedules(self) -> None:
        self.lam.fill_(self.course.lam(self.steps))
        self.mask_ratio.fill_(self.course.mask_ratio(self.steps))
        self.one_hot_factor.fill_(self.one_hot_weight if self.course.sharpens(self.steps) else 0.0)
        self.goals.set(self.targets_passed, self.course.way(self.steps, self.targets_passed))

    def _keep_candidates(
        self, name: str, alive: Tensor, optimizer: Optimizer | None, how: str, copies: Sequence["Supernet"] = ()
    ) -> None:
        """Remove the units no living candidate keeps, then the dead candidates, from the copies too, and note a size
        that became final."""
        bimask = self.bimasks[name]
        probabilities = bimask.sizes(bimask.alive)
        index, size = bimask.units_kept_by(alive)
        for each in copies:
            each._cut(name, alive, index, size, optimizer=None)
        self._cut(name, alive, index, size, optimizer)
        if bimask.final:
            heads, channels = size
            self.choices.append(
                {
                    "submodule": name,
                    "size": [heads, channels] if name.startswith("attn") else channels,
                    "how": how,
                    "probability": probabilities[size],
                    "step": self.steps,
                }
            )
            for each in copies:
                each.choices = list(self.choices)

    def _cut(self, name: str, alive: Tensor, index: Tensor, size: Size, optimizer: Optimizer | None) -> None:
        """Keep of a submodule the units at `index`, of this size, and the candidates in `alive`."""
        bimask = self.bimasks[name]
        if size != bimask.candidates.full:
            index = index.to(bimask.score.device)
            keep_units(self, self.couplings[name], index, bimask.candidates.full, optimizer)
        bimask.keep_candidates(alive, self.lam, optimizer)
        attention = [b.candidates.full for n, b in self.bimasks.items() if n.startswith("attn")]
        self.family.sync_sizes(self.model, attention)
        if self.masked_images is not None:
            self.masked_images.decoder.in_features = self.masked_images.decoder.weight.shape[1]
        self._build_stacks()

    def _couplings(self, name: str, couplings: tuple[Coupling, ...]) -> list[Coupling]:
        """The model's couplings under their names here, plus what here has the submodule's units."""
        own = [Coupling(f"bimasks.{name}.score", 0), Coupling(f"bimasks.{name}.scale", 0)]
        if self.masked_images is not None and name == self.macs.widths[0]:
            own.append(Coupling("masked_images.mask_token", 2))
        if self.masked_images is not None and name == self.macs.widths[-1]:
            own.append(Coupling("masked_images.decoder.weight", 1))
        return own + [dataclasses.replace(c, parameter=f"model.{c.parameter}") for c in couplings]

    def _backend(self) -> AbstractContextManager:
        return nullcontext() if self.backend is None else use_backend(self.backend)

    def _casts_at_once(self) -> AbstractContextManager:
        return nullcontext() if torch.compiler.is_compiling() else self.casts


def _begins_alike(part: object, whole: Tensor) -> bool:
    return isinstance(part, Tensor) and torch.equal(part.to(whole.device), whole[: len(part)])
