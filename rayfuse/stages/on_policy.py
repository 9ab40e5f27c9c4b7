"""On-policy distillation across tokenizers: the student's own texts, and what the teachers would have said there.

The student writes to a share of the prompts; the teachers read what it wrote. With q the teachers' distribution at a
position, carried byte by byte onto cells of the student's tokens (prepare/routed.py), and p the student's,

    own, taught        l_n = D(q, p) on the cells and one bucket for the rest          (losses/divergence.py)
    own, not taught    l_n = - A_c log p(y_n)      where the teachers gave the text so far almost no probability
    written            l_n = - log p(y_n)

    L = SUM_n c_n l_n / N        c_n: how much a position counts; N: the positions of the global batch

Both own losses are bounded. Which teacher counts how much is known before the student writes: an expert finds a wrong
answer unlikely, so a posterior from the student's text would choose the teacher that shares its mistake.

budget "teachers": own positions of teacher s (where it weighs most) count N_own / (F N_s), F the teachers that have
any: each field has an equal share of the own tokens, however long its answers are (arXiv 2608.19098).
"""

from __future__ import annotations

import torch

from rayfuse.batch import Counts, FusionBatch, RolloutTarget
from rayfuse.config import OnPolicy
from rayfuse.losses import HeadOutput, advantage_losses, cell_logps, divergences, used_columns
from rayfuse.stages.tensors import on_device


def on_policy_loss(
    stage: OnPolicy, head: HeadOutput, batch: FusionBatch, totals: Counts
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """This micro-batch's share of the global batch's loss.

    The parts are the three losses, each over all positions of the global batch.
    """
    target = batch.rollouts
    assert target is not None
    assert head.picked is not None
    device = head.picked.device
    own_N, counts_N = on_device(target.own, device), on_device(target.counts, device)
    label_logps_N = head.picked[:, 0] - head.lse
    written_N = -label_logps_N * ~own_N
    taught_N, advantage_N = _own_losses(stage, head, target, label_logps_N)
    own_counts_N = counts_N * _budget(stage, batch, totals, device)
    parts = {
        "loss_sft": (counts_N * written_N).sum() / totals.tokens,
        "loss_divergence": (own_counts_N * taught_N).sum() / totals.tokens,
        "loss_advantage": (own_counts_N * advantage_N).sum() / totals.tokens,
    }
    loss = torch.stack(list(parts.values())).sum()
    parts = {name: part.detach() for name, part in parts.items()}
    by_advantage = (target.chunks >= 0) & ~target.taught
    parts["taught_by_advantage"] = torch.tensor(by_advantage.sum() / totals.tokens)
    for one in batch.targets:
        parts[f"routed/{one.teacher}"] = torch.tensor(len(one.rows) / totals.tokens)
    return loss, parts


def _own_losses(
    stage: OnPolicy, head: HeadOutput, target: RolloutTarget, label_logps_N: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The losses [N] of own positions with a distribution, and of those without; 0 elsewhere."""
    assert head.picked is not None
    device = head.picked.device
    taught_N = on_device(target.taught, device)
    chunks_N, teacher_N = on_device(target.chunks, device), on_device(target.chunk_logps, device)
    advantage_N = advantage_losses(label_logps_N, chunks_N, teacher_N, stage.bound) * ~taught_N
    losses_N = torch.zeros_like(label_logps_N)
    if not target.taught.any():
        return losses_N, advantage_N
    cells_RM, mass_RM = on_device(target.cells, device)[taught_N], on_device(target.mass, device)[taught_N]
    logp_RC = cell_logps(head.picked[taught_N], head.lse[taught_N], cells_RM)
    values_R = divergences(stage.divergence, logp_RC, mass_RM, used_columns(cells_RM), stage.bound)
    return losses_N.masked_scatter(taught_N, values_R), advantage_N


def _budget(stage: OnPolicy, batch: FusionBatch, totals: Counts, device: torch.device) -> torch.Tensor:
    """How much each own position counts [N] besides its sample's weight."""
    budget_N = torch.ones(len(batch.labels), device=device)
    if stage.budget == "tokens":
        return budget_N
    fields = sum(pairs > 0 for pairs in totals.pairs)
    for s, target in enumerate(batch.targets):
        if len(target.rows):
            budget_N[on_device(target.rows, device)] = sum(totals.pairs) / (fields * totals.pairs[s])
    return budget_N
