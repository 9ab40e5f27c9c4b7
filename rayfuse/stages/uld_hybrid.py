"""ULD with matched tokens, as TRL's GOLD trainer has it: shared tokens one by one, all others rank by rank.

At a position where both have read the same bytes, p and q are the true probabilities of student and teacher:

    L_JSD  = sum over shared tokens v of   beta q_v log(q_v / m_v) + (1 - beta) p_v log(p_v / m_v)
             m = beta q + (1 - beta) p,  p and q not renormalised, at least 1e-8
    L_rank = sum_i | p'_(i) - q'_(i) |      p', q': sorted probabilities of the tokens that the other model lacks;
                                            0 where a model has no such token
    L_s    = tokenmean  w L_JSD + (1 - w) L_rank       w: share of the teacher's vocabulary that is shared

With K = V this is TRL 1.16's loss. With fewer, L_JSD runs over the shared ones among the teacher's top-K, and p', q'
hold what each side's own top-K has of unshared tokens.
"""

from __future__ import annotations

import math

import numpy as np
import torch

from rayfuse.batch import Counts, FusionBatch
from rayfuse.config import ULDHybrid
from rayfuse.losses import HeadOutput
from rayfuse.stages.distillation import distill, kept_tokens
from rayfuse.stages.tensors import on_device

LEAST = 1e-8
"""TRL's lower bound of a probability under the logarithm."""


def uld_hybrid_loss(
    stage: ULDHybrid, head: HeadOutput, batch: FusionBatch, totals: Counts
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """This micro-batch's share of the global batch's loss; `loss_hybrid/TEACHER` is L_s. Needs head.lse's gradient."""

    def distance(s: int) -> torch.Tensor:
        target = batch.targets[s]
        assert target.unmatched is not None
        matched_weight = target.overlap if stage.matched_weight is None else stage.matched_weight
        student_Pk, teacher_Pk, shared_Pk = kept_tokens(head, batch, s)
        rows_P = on_device(target.rows, student_Pk.device)
        lse_P1 = head.lse[rows_P, None]
        matched = _jsd(teacher_Pk.exp(), (student_Pk - lse_P1).exp(), shared_Pk, stage.beta)

        unmatched_V = on_device(np.unpackbits(target.unmatched), student_Pk.device)
        if target.overlap == 1 or not unmatched_V.any():
            return matched_weight * matched
        student_Pk = (head.topk[rows_P] - lse_P1).exp() * unmatched_V[head.ids[rows_P]]
        unmatched = (_sorted(student_Pk) - _sorted(teacher_Pk.exp() * ~shared_Pk)).abs().sum(1)
        return matched_weight * matched + (1 - matched_weight) * unmatched

    return distill(stage, head, batch, totals, "loss_hybrid", distance)


def _jsd(q_Pk: torch.Tensor, p_Pk: torch.Tensor, shared_Pk: torch.Tensor, beta: float) -> torch.Tensor:
    """Generalised Jensen-Shannon divergence over the shared tokens [P]."""
    logq_Pk, logp_Pk = (values.clamp_min(LEAST).log() for values in (q_Pk, p_Pk))
    logm_Pk = torch.logaddexp(logq_Pk + math.log(beta), logp_Pk + math.log(1 - beta))
    jsd_Pk = beta * logq_Pk.exp() * (logq_Pk - logm_Pk) + (1 - beta) * logp_Pk.exp() * (logp_Pk - logm_Pk)
    return (jsd_Pk * shared_Pk).sum(1)


def _sorted(values_Pk: torch.Tensor) -> torch.Tensor:
    return values_Pk.sort(dim=-1, descending=True).values
