"""InfiFusion, unified form (arXiv 2501.02795): cross-tokenizer distillation on standardised top-K logits.

    l_m    = topk(z_m, K)                                    each model keeps its OWN top-K, sorted descending
    lhat_m = (l_m - mean_K(l_m)) / (std_K(l_m) + eps)        z-score over the K kept values
    L_s    = tokenmean sum_i | lhat_student_i - lhat_s_i |   rank i against rank i, where both have read the same bytes
    L      = (1 - lam) L_SFT + lam * SUM_s w_s L_s

The teacher's top log-probabilities stand for its logits: they differ by one constant per position, which neither the
z-score nor a softmax over the K kept values sees.
"""

from __future__ import annotations

import numpy as np
import torch

from rayfuse.batch import FusionBatch
from rayfuse.config import InfiFusion
from rayfuse.losses import HeadOutput, uld_loss
from rayfuse.stages.sft import sft_loss


def infifusion_loss(
    stage: InfiFusion, head: HeadOutput, batch: FusionBatch, totals: np.ndarray
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """This micro-batch's share of the global batch's loss.

    `totals[0]` counts the predicted tokens of the global batch, `totals[1 + s]` the positions aligned with teacher s.
    """
    sft, parts = sft_loss(stage, head, batch, totals)  # type: ignore[arg-type]
    distillation = head.topk.new_zeros(())
    for s, target in enumerate(batch.targets):
        P = len(target.rows)
        if P == 0:
            continue
        rows_P = torch.from_numpy(target.rows).to(head.topk.device)
        teacher_PK = torch.from_numpy(target.logps).to(head.topk.device).float()
        student_PK = head.topk[rows_P]
        distance = uld_loss(student_PK, teacher_PK, standardized=stage.standardized, space=stage.space)
        share = distance * (P / totals[1 + s])
        parts[f"loss_uld/{target.teacher}"] = share.detach()
        distillation = distillation + target.weight * share
    if stage.over_teachers == "mean":
        distillation = distillation / len(batch.targets)
    return (1 - stage.lam) * sft + stage.lam * distillation, parts
