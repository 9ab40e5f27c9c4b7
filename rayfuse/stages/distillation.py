"""What the baselines that compare a teacher's and the student's kept logits share.

L = (1 - lam) L_SFT + lam SUM_s w_s L_s        L_s: mean over the positions at which teacher s meets the student

Where the consensus weighs (teacher_weights, sample_weights), a position of sample b counts v_b p_sb times in L_s: v_b
is how probably the response is right, p_sb how probably teacher s is right there. Denominators stay: with p one-hot in
every sample the sum over the teachers is what each sample's own teacher gives, with p = 1 it is the papers' sum.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from rayfuse.batch import Counts, FusionBatch
from rayfuse.config import Distillation
from rayfuse.losses import HeadOutput
from rayfuse.stages.sft import sft_loss
from rayfuse.stages.tensors import on_device


def distill(
    stage: Distillation,
    head: HeadOutput,
    batch: FusionBatch,
    totals: Counts,
    name: str,
    distance: Callable[[int], torch.Tensor],
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """This micro-batch's share of the global batch's loss; the parts hold `name` of each teacher.

    Args:
        stage: lam and over_teachers.
        head: the student's output.
        batch: the micro-batch.
        totals: denominators of the global batch.
        name: of the distance in the metrics.
        distance: of teacher s, [P] at the micro-batch's positions aligned with it; where there is a part for each
            sample besides, [P + B].
    """
    sft, parts = sft_loss(stage, head, batch, totals)
    distances = [weighted_sum(batch, s, distance(s)) / max(totals.pairs[s], 1) for s in range(len(batch.targets))]
    for target, value in zip(batch.targets, distances, strict=True):
        parts[f"{name}/{target.teacher}"] = value.detach()
    return (1 - stage.lam) * sft + stage.lam * over_teachers(stage, batch, distances), parts


def weighted_sum(batch: FusionBatch, s: int, distances: torch.Tensor) -> torch.Tensor:
    """The sum of teacher s's distances [P] or [P + B], each as much as its sample counts for that teacher."""
    factors_B = batch.factors(s)
    if factors_B is None:
        return distances.sum()
    factors = np.concatenate((factors_B[batch.sample[batch.targets[s].rows]], factors_B))[: len(distances)]
    return (distances * on_device(factors, distances.device)).sum()


def kept_ranks(head: HeadOutput, batch: FusionBatch, s: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Both sides' own top k [P, k], sorted descending, at the P positions where teacher s meets the student: the
    student's logits, differentiable, and the teacher's log-probabilities."""
    target, device = batch.targets[s], head.topk.device
    return head.topk[on_device(target.rows, device)], on_device(target.logps, device).float()


def kept_tokens(head: HeadOutput, batch: FusionBatch, s: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Both sides of the tokens that teacher s kept, at the P positions where it meets the student.

    Returns:
        The student's logits [P, k], differentiable; the teacher's log-probabilities [P, k]; and where the student has
        the token at all [P, k] (elsewhere its logit is of another token).
    """
    target = batch.targets[s]
    assert head.picked is not None
    assert target.ids is not None
    device, k = head.picked.device, target.logps.shape[1]
    rows_P = on_device(target.rows, device)
    student_Pk = head.picked[rows_P, s * k : (s + 1) * k]
    return student_Pk, on_device(target.logps, device).float(), on_device(target.ids, device) >= 0


def over_teachers(stage: Distillation, batch: FusionBatch, distances: list[torch.Tensor]) -> torch.Tensor:
    """The sum (or mean) over the teachers of w_s times their distance."""
    total = torch.stack([target.weight * d for target, d in zip(batch.targets, distances, strict=True)]).sum()
    return total / len(distances) if stage.over_teachers == "mean" else total
