"""InfiFusion, unified form (arXiv 2501.02795): cross-tokenizer distillation on standardised top-K logits.

    l_m    = topk(z_m, K)                                    each model keeps its OWN top-K, sorted descending
    lhat_m = (l_m - mean_K(l_m)) / (std_K(l_m) + eps)        z-score over the K kept values
    L_s    = tokenmean sum_i | lhat_student_i - lhat_s_i |   rank i against rank i, where both have read the same bytes
    L      = (1 - lam) L_SFT + lam * SUM_s w_s L_s

The teacher's top log-probabilities stand for its logits: they differ by one constant per position, which neither the
z-score nor a softmax over the K kept values sees.
"""

from __future__ import annotations

import torch

from rayfuse.batch import Counts, FusionBatch, TeacherTarget
from rayfuse.config import Distillation, RankDistillation
from rayfuse.losses import HeadOutput, uld_loss
from rayfuse.stages.sft import sft_loss


def infifusion_loss(
    stage: RankDistillation, head: HeadOutput, batch: FusionBatch, totals: Counts
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """This micro-batch's share of the global batch's loss."""
    sft, parts = sft_loss(stage, head, batch, totals)
    distances = [rank_distance(stage, head, t, totals.pairs[s]) for s, t in enumerate(batch.targets)]
    for target, distance in zip(batch.targets, distances, strict=True):
        parts[f"loss_uld/{target.teacher}"] = distance.detach()
    return (1 - stage.lam) * sft + stage.lam * over_teachers(stage, batch, distances), parts


def rank_distance(stage: RankDistillation, head: HeadOutput, target: TeacherTarget, pairs: float) -> torch.Tensor:
    """L_s of one teacher: this micro-batch's share of the mean over the `pairs` aligned positions of the batch."""
    device = head.topk.device
    student_PK = head.topk[torch.from_numpy(target.rows).to(device)]
    teacher_PK = torch.from_numpy(target.logps).to(device)
    distance = uld_loss(student_PK, teacher_PK, standardized=stage.standardized, space=stage.space)
    return distance * (len(target.rows) / max(pairs, 1))


def over_teachers(stage: Distillation, batch: FusionBatch, distances: list[torch.Tensor]) -> torch.Tensor:
    """The sum (or mean) over the teachers of w_s times their distance."""
    total = torch.stack([target.weight * d for target, d in zip(batch.targets, distances, strict=True)]).sum()
    return total / len(distances) if stage.over_teachers == "mean" else total
