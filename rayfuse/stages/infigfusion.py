"""InfiGFusion (arXiv 2505.13893): InfiFusion plus a distance between graphs on the logits.

    Z_m    = gauge(l_m)                          [L_m, K]  log-softmax over the K kept values of a sample's positions
    C_m    = cosine graph of the columns of Z_m  [K, K]    rank i is node i
    f_m    = row means of C_m, sorted
    L_GLD  = samplemean sum_i | f_student_i - f_s_i |      closed form of a Gromov-Wasserstein distance
    L      = (1 - lam) L_SFT + lam * SUM_s w_s ( L_ULD,s + alpha * L_GLD,s )

The graphs sum over positions, so they need no alignment. The teachers' features come ready in the batch.
"""

from __future__ import annotations

import torch

from rayfuse.batch import Counts, FusionBatch
from rayfuse.config import InfiGFusion
from rayfuse.losses import HeadOutput, gauge, gld_distance, gld_features
from rayfuse.stages.infifusion import over_teachers, rank_distance
from rayfuse.stages.sft import sft_loss


def infigfusion_loss(
    stage: InfiGFusion, head: HeadOutput, batch: FusionBatch, totals: Counts
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """This micro-batch's share of the global batch's loss.

    `gradient_ratio` in the parts is the norm of alpha * L_GLD's gradient over that of L_ULD's, both with respect to the
    student's kept logits: what to look at when choosing alpha.
    """
    sft, parts = sft_loss(stage, head, batch, totals)
    sample_N = torch.from_numpy(batch.sample).to(head.topk.device)
    student_BK = gld_features(gauge(head.topk), sample_N, len(batch.input_ids))
    ranks, graphs = [], []
    for s, target in enumerate(batch.targets):
        assert target.graph is not None
        teacher_BK = torch.from_numpy(target.graph).to(student_BK.device)
        ranks.append(rank_distance(stage, head, target, totals.pairs[s]))
        graphs.append(gld_distance(student_BK, teacher_BK).sum() / totals.samples)
        parts[f"loss_uld/{target.teacher}"] = ranks[-1].detach()
        parts[f"loss_gld/{target.teacher}"] = graphs[-1].detach()
    uld, gld = over_teachers(stage, batch, ranks), stage.alpha * over_teachers(stage, batch, graphs)
    parts["gradient_ratio"] = _gradient_norm(gld, head.topk) / _gradient_norm(uld, head.topk).clamp_min(1e-12)
    return (1 - stage.lam) * sft + stage.lam * (uld + gld), parts


def _gradient_norm(loss: torch.Tensor, topk_NK: torch.Tensor) -> torch.Tensor:
    if not topk_NK.requires_grad:
        return topk_NK.new_zeros(())
    (gradient,) = torch.autograd.grad(loss, topk_NK, retain_graph=True)
    return gradient.norm()
