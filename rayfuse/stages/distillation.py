"""What the baselines that compare a teacher's and the student's kept logits share.

L = (1 - lam) L_SFT + lam SUM_s w_s L_s        L_s: mean over the positions at which teacher s meets the student
"""

from __future__ import annotations

from collections.abc import Callable

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
        distance: of teacher s, summed over the micro-batch's aligned positions.
    """
    sft, parts = sft_loss(stage, head, batch, totals)
    distances = [distance(s) / max(totals.pairs[s], 1) for s in range(len(batch.targets))]
    for target, value in zip(batch.targets, distances, strict=True):
        parts[f"{name}/{target.teacher}"] = value.detach()
    return (1 - stage.lam) * sft + stage.lam * over_teachers(stage, batch, distances), parts


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
