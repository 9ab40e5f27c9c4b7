"""InfiFPO (arXiv 2505.13878): preference optimisation against the teachers' fused sequence probabilities.

lp_m(y) = (1/|y|_m) log M_m(y|x)       |y|_m tokens of y under model m's own tokenizer, end-of-turn counted   eq. 10
clip:     y_w: lp_i <- max(lp_i, lp_init)      y_l: lp_i <- min(lp_i, lp_init)                                eq. 11
lp_fu   = lp_{i*},  i* = argmax_i | exp(lp_i) - exp(lp_policy) |     (or a mean, or weighted by confidence)   eq. 12
u       = beta [ (lp_policy(y_w) - lp_fu(y_w)) - (lp_policy(y_l) - lp_fu(y_l)) ]
L       = pairmean -log sigmoid(u)                                                                            eq. 13
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from rayfuse.batch import Counts, FusionBatch, TeacherTarget
from rayfuse.config import DPO, FusedPreference, InfiFPO, Preference
from rayfuse.device import on_device
from rayfuse.losses import fpo_loss, fuse_pairs

Sides = dict[str, torch.Tensor]


def infifpo_loss(
    stage: InfiFPO, logps_N: torch.Tensor, batch: FusionBatch, totals: Counts
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """This micro-batch's share of the mean over the pairs of the global batch.

    The last of `batch.targets` is the model that the stage starts from; the others are the teachers.
    """
    *teachers, initial = [of_model(stage, target, logps_N.device) for target in batch.targets]
    policy = of_policy(stage, logps_N, batch)
    answered = _answered(stage, batch, logps_N.device)
    return preference_loss(stage, policy, fuse_teachers(stage, teachers, initial, policy, answered), totals)


def fuse_teachers(
    stage: FusedPreference,
    teachers: Sequence[Sides],
    initial: Sides,
    policy: Sides,
    answered_SP: torch.Tensor | None = None,
) -> Sides:
    """lp_fu of every response, by side; of the teachers that answered where some are missing."""
    current = policy if stage.margin_from == "policy" else initial
    return fuse_pairs(
        {side: torch.stack([teacher[side] for teacher in teachers]) for side in stage.sides},
        initial,
        {side: logps_P.detach() for side, logps_P in current.items()},
        rule=stage.rule,
        clip=stage.clip,
        per=stage.fuse_per,
        answered=answered_SP,
    )


def _answered(stage: FusedPreference, batch: FusionBatch, device: torch.device) -> torch.Tensor | None:
    """Which teachers answered which pair [S, P]; None where all did. A pair is answered as a whole or not at all."""
    if batch.shares is None:
        return None
    sides = len(stage.sides)
    pairs = len(batch.input_ids) // sides
    of_teachers = [np.ones(pairs, bool) if t.answered is None else t.answered[0::sides] for t in batch.targets[:-1]]
    return on_device(np.stack(of_teachers), device)


def preference_loss(
    stage: InfiFPO | DPO, policy: Sides, reference: Sides, totals: Counts
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The loss of the policy's log-probabilities against a reference's, and what to watch: accuracy and margin."""
    loss_P = fpo_loss(
        policy["chosen"],
        policy["rejected"],
        reference["chosen"],
        reference["rejected"],
        beta=stage.beta,
        variant=stage.variant,
    )
    margin_P = (policy["chosen"] - reference["chosen"]) - (policy["rejected"] - reference["rejected"])
    return mean_over_prompts(stage, loss_P, margin_P, policy["chosen"] > policy["rejected"], totals)


def mean_over_prompts(
    stage: Preference, loss_P: torch.Tensor, margin_P: torch.Tensor, preferred_P: torch.Tensor, totals: Counts
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """This micro-batch's share of the means over the prompts of the global batch: of the loss, and of what to watch."""
    prompts = totals.samples / len(stage.sides)
    parts = {
        "preferred": preferred_P.sum().float() / prompts,
        "margin": stage.beta * margin_P.detach().sum() / prompts,
    }
    return loss_P.sum() / prompts, parts


def of_policy(stage: Preference, logps_N: torch.Tensor, batch: FusionBatch) -> Sides:
    """The student's own log-probability of each response, by side; differentiable."""
    sample_N = on_device(batch.sample, logps_N.device)
    logps_B = logps_N.new_zeros(len(batch.input_ids)).index_add(0, sample_N, logps_N)
    return _sides(stage, logps_B, torch.bincount(sample_N, minlength=len(logps_B)))


def of_model(stage: Preference, target: TeacherTarget, device: torch.device) -> Sides:
    """Another model's log-probability of each response, by side."""
    assert target.response_logps is not None
    assert target.response_tokens is not None
    return _sides(stage, on_device(target.response_logps, device), on_device(target.response_tokens, device))


def _sides(stage: Preference, logps_B: torch.Tensor, tokens_B: torch.Tensor) -> Sides:
    """A unit holds the sides of one prompt after those of another: chosen, rejected, chosen, rejected, ..."""
    normalised_B = logps_B / tokens_B if stage.length_norm else logps_B
    return {side: normalised_B[index :: len(stage.sides)] for index, side in enumerate(stage.sides)}
