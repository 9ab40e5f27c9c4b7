"""What the stages on preferences share: sides, fused references, and the loss over prompts."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from rayfuse.batch import Counts, FusionBatch, TeacherTarget
from rayfuse.config import DPO, FusedPreference, InfiFPO, Preference
from rayfuse.losses import fpo_loss, fuse_pairs
from rayfuse.stages.tensors import on_device

Sides = dict[str, torch.Tensor]


def fuse_teachers(
    stage: FusedPreference,
    teachers: Sequence[Sides],
    initial: Sides,
    policy: Sides,
    weights: Sequence[float],
    answered_SP: torch.Tensor | None = None,
) -> Sides:
    """lp_fu of every response, by side; of the teachers that answered where some are missing. `weights`: of each."""
    current = policy if stage.margin_from == "policy" else initial
    return fuse_pairs(
        {side: torch.stack([teacher[side] for teacher in teachers]) for side in stage.sides},
        initial,
        {side: logps_P.detach() for side, logps_P in current.items()},
        rule=stage.rule,
        clip=stage.clip,
        per=stage.fuse_per,
        answered=answered_SP,
        weights=torch.tensor(weights),
    )


def answered_sides(stage: FusedPreference, batch: FusionBatch, device: torch.device) -> torch.Tensor | None:
    """Which teachers answered which pair [S, P]; None where all did. A pair is answered as a whole or not at all."""
    if batch.shares is None:
        return None
    sides = len(stage.sides)
    pairs = len(batch.input_ids) // sides
    answered_SP = [np.ones(pairs, bool) if t.answered is None else t.answered[0::sides] for t in batch.targets[:-1]]
    return on_device(np.stack(answered_SP), device)


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
