"""Knowledge distillation (Hinton et al. 2015, arXiv 1503.02531) on the tokens that teacher and student share.

At a position where both have read the same bytes, C is the set of the teacher's top-K tokens that the student has too;
both sides are renormalised over C, with temperature tau:

    q = softmax(l_C / tau)        p = softmax(z_C / tau)        l, z: the teacher's and the student's logits
    L_s = tokenmean tau^2 D       D = KL(q || p)                                      forward
                                  D = KL(p || q)                                      reverse (arXiv 2306.08543)
                                  D = 1/2 KL(q || m) + 1/2 KL(p || m), m = (p + q)/2  jsd (arXiv 2306.13649)

A position at which C is empty counts with D = 0. Log-probabilities serve as logits: they differ by one constant.
"""

from __future__ import annotations

import math

import torch

from rayfuse.batch import Counts, FusionBatch
from rayfuse.config import KL
from rayfuse.losses import HeadOutput
from rayfuse.stages.distillation import distill, kept_tokens


def kl_loss(
    stage: KL, head: HeadOutput, batch: FusionBatch, totals: Counts
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """This micro-batch's share of the global batch's loss; `loss_kl/TEACHER` is L_s in nats per aligned position."""

    def distance(s: int) -> torch.Tensor:
        student_Pk, teacher_Pk, shared_Pk = kept_tokens(head, batch, s)
        some_P = shared_Pk.any(1)  # a softmax over nothing has no gradient but NaN
        shared_Rk = shared_Pk[some_P]
        logp_Rk = _log_softmax(student_Pk[some_P] / stage.temperature, shared_Rk)
        logq_Rk = _log_softmax(teacher_Pk[some_P] / stage.temperature, shared_Rk)
        divergence_R = DIVERGENCES[stage.divergence](logq_Rk, logp_Rk, shared_Rk)
        return stage.temperature**2 * divergence_R.new_zeros(len(some_P)).masked_scatter(some_P, divergence_R)

    return distill(stage, head, batch, totals, "loss_kl", distance)


def _log_softmax(logits_Rk: torch.Tensor, shared_Rk: torch.Tensor) -> torch.Tensor:
    """Over the shared tokens of each row; 0 elsewhere."""
    return logits_Rk.masked_fill(~shared_Rk, -torch.inf).log_softmax(-1).masked_fill(~shared_Rk, 0.0)


def _kl(logq_Rk: torch.Tensor, logp_Rk: torch.Tensor, shared_Rk: torch.Tensor) -> torch.Tensor:
    """KL(q || p) of each row."""
    return (logq_Rk.exp() * (logq_Rk - logp_Rk) * shared_Rk).sum(1)


def _jsd(logq_Rk: torch.Tensor, logp_Rk: torch.Tensor, shared_Rk: torch.Tensor) -> torch.Tensor:
    logm_Rk = torch.logaddexp(logq_Rk, logp_Rk) - math.log(2)
    return (_kl(logq_Rk, logm_Rk, shared_Rk) + _kl(logp_Rk, logm_Rk, shared_Rk)) / 2


DIVERGENCES = {"forward": _kl, "reverse": lambda logq, logp, shared: _kl(logp, logq, shared), "jsd": _jsd}
"""Divergence by its name, of (log q, log p, shared)."""
