"""InfiFusion, unified form (arXiv 2501.02795): cross-tokenizer distillation on standardised top-K logits.

    l_m    = topk(z_m, K)                                    each model keeps its OWN top-K, sorted descending
    lhat_m = (l_m - mean_K(l_m)) / (std_K(l_m) + eps)        z-score over the K kept values
    L_s    = tokenmean sum_i | lhat_student_i - lhat_s_i |   rank i against rank i, where both have read the same bytes
    L      = (1 - lam) L_SFT + lam * SUM_s w_s L_s

Where teachers are missing in a sample, the others count f_b = SUM_s w_s / SUM_{s answered b} w_s times as much there,
and L_s is divided by the positions that teacher s would have had: every sample keeps its share of the loss. By the
consensus (teacher_weights, sample_weights) a sample's positions count as in distillation.py.

The teacher's top log-probabilities stand for its logits: they differ by one constant per position, which neither the
z-score nor a softmax over the K kept values sees. Without both (`standardized: false, space: logits`) the constant
counts: there the student's logits are made log-probabilities too, by the log-sum-exp over its whole vocabulary, whose
gradient the head then has to give.
"""

from __future__ import annotations

import torch

from rayfuse.batch import Counts, FusionBatch
from rayfuse.config import RankDistillation
from rayfuse.losses import HeadOutput, uld_distances
from rayfuse.stages.distillation import over_teachers, weighted_sum
from rayfuse.stages.sft import sft_loss
from rayfuse.stages.tensors import on_device


def infifusion_loss(
    stage: RankDistillation, head: HeadOutput, batch: FusionBatch, totals: Counts
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """This micro-batch's share of the global batch's loss."""
    sft, parts = sft_loss(stage, head, batch, totals)
    distances = [rank_distance(stage, head, batch, s, totals) for s in range(len(batch.targets))]
    for target, distance in zip(batch.targets, distances, strict=True):
        parts[f"loss_uld/{target.teacher}"] = distance.detach()
    return (1 - stage.lam) * sft + stage.lam * over_teachers(stage, batch, distances), parts


def rank_distance(
    stage: RankDistillation, head: HeadOutput, batch: FusionBatch, s: int, totals: Counts
) -> torch.Tensor:
    """L_s of teacher s: this micro-batch's share of the mean over the aligned positions of the global batch."""
    target = batch.targets[s]
    device = head.topk.device
    rows_P = on_device(target.rows, device)
    student_PK = head.topk[rows_P]
    if stage.needs_one_gauge:
        student_PK = student_PK - head.lse[rows_P, None]
    teacher_PK = on_device(target.logps, device)
    distance_P = uld_distances(student_PK, teacher_PK, standardized=stage.standardized, space=stage.space)
    return weighted_sum(batch, s, distance_P) / max(totals.expected_pairs(s), 1)
