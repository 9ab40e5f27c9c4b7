"""InfiGFusion (arXiv 2505.13893): InfiFusion plus a distance between graphs on the logits.

    Z_m    = gauge(l_m)                          [L_m, K]  log-softmax over the K kept values of a sample's positions
    C_m    = cosine graph of the columns of Z_m  [K, K]    rank i is node i
    f_m    = row means of C_m, sorted
    L_GLD  = samplemean sum_i | f_student_i - f_s_i |      closed form of a Gromov-Wasserstein distance
    L      = (1 - lam) L_SFT + lam * SUM_s w_s ( L_ULD,s + alpha * L_GLD,s )

The graphs sum over positions, so they need no alignment. The teachers' features come ready in the batch.

Mode `exact` (ours) puts the distance that the closed form stands for in its place, to measure how good that is:

    L_GLD  = samplemean min_T sum_ijpq (C_student_ij - C_s_pq)^2 T_ip T_jq

with T solved by POT on the detached graphs and held constant (envelope theorem). It is a mean over pairs of nodes of
squared differences, where the closed form is a sum over nodes of absolute ones: alpha means another strength there.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch

from rayfuse.batch import Counts, FusionBatch
from rayfuse.config import InfiGFusion
from rayfuse.losses import HeadOutput, gauge, gld_distance, gld_features, gld_graphs, gw_distance
from rayfuse.stages.distillation import over_teachers
from rayfuse.stages.infifusion import rank_distance
from rayfuse.stages.sft import sft_loss
from rayfuse.stages.tensors import on_device

Parts = dict[str, torch.Tensor]


def infigfusion_loss(
    stage: InfiGFusion, head: HeadOutput, batch: FusionBatch, totals: Counts
) -> tuple[torch.Tensor, Parts]:
    """This micro-batch's share of the global batch's loss.

    `gradient_ratio` in the parts is the norm of alpha * L_GLD's gradient over that of L_ULD's, both with respect to the
    student's kept logits: what to look at when choosing alpha. In exact mode `coupling_wait` is how many seconds the
    step waited for the couplings, while the rest of the loss was ready.
    """
    begin = {"closed": _closed, "exact": _exact}[stage.mode]
    distances = begin(head, batch)
    sft, parts = sft_loss(stage, head, batch, totals)
    ranks = [rank_distance(stage, head, batch, s, totals) for s in range(len(batch.targets))]
    weighted = _by_share(batch, distances(parts))
    graphs = [distance_B.sum() / totals.samples for distance_B in weighted]
    for target, rank, graph in zip(batch.targets, ranks, graphs, strict=True):
        parts[f"loss_uld/{target.teacher}"] = rank.detach()
        parts[f"loss_gld/{target.teacher}"] = graph.detach()
    uld, gld = over_teachers(stage, batch, ranks), stage.alpha * over_teachers(stage, batch, graphs)
    parts["gradient_ratio"] = _gradient_norm(gld, head.topk) / _gradient_norm(uld, head.topk).clamp_min(1e-12)
    return (1 - stage.lam) * sft + stage.lam * (uld + gld), parts


def _closed(head: HeadOutput, batch: FusionBatch) -> Callable[[Parts], list[torch.Tensor]]:
    """The closed-form distance [B] to each teacher."""
    student_BK = gld_features(gauge(head.topk), _sample(head, batch), len(batch.input_ids))
    return lambda parts: [gld_distance(student_BK, teacher) for teacher in _graphs(head, batch)]


def _exact(head: HeadOutput, batch: FusionBatch) -> Callable[[Parts], list[torch.Tensor]]:
    """The exact distance [B] to each teacher; its couplings are being solved until the result is called for."""
    from rayfuse.stages.couplings import begin_couplings

    student_BKK = gld_graphs(gauge(head.topk), _sample(head, batch), len(batch.input_ids))
    teachers = _graphs(head, batch)
    couplings = begin_couplings(student_BKK, [target.graph for target in batch.targets if target.graph is not None])

    def finish(parts: Parts) -> list[torch.Tensor]:
        begun = time.perf_counter()
        found = couplings()
        parts["coupling_wait"] = torch.tensor(time.perf_counter() - begun)
        return [gw_distance(student_BKK, teacher, T) for teacher, T in zip(teachers, found, strict=True)]

    return finish


def _sample(head: HeadOutput, batch: FusionBatch) -> torch.Tensor:
    return on_device(batch.sample, head.topk.device)


def _graphs(head: HeadOutput, batch: FusionBatch) -> list[torch.Tensor]:
    graphs = [target.graph for target in batch.targets]
    return [on_device(graph, head.topk.device) for graph in graphs if graph is not None]


def _by_share(batch: FusionBatch, distances: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The graph distances [B] of each teacher, each as much as its sample counts for that teacher (batch.factors)."""
    factors = [batch.factors(s) for s in range(len(distances))]
    return [
        distance_B if factors_B is None else distance_B * on_device(factors_B, distance_B.device)
        for distance_B, factors_B in zip(distances, factors, strict=True)
    ]


def _gradient_norm(loss: torch.Tensor, topk_NK: torch.Tensor) -> torch.Tensor:
    if not topk_NK.requires_grad:
        return topk_NK.new_zeros(())
    (gradient,) = torch.autograd.grad(loss, topk_NK, retain_graph=True)
    return gradient.norm()
