"""MultiLevelOT (arXiv 2412.14528): optimal transport at the level of tokens and of the sequence.

    y_m    = l_m / (std_K(l_m) + 1e-4)               [P, K]  kept logits, scaled by their deviation, not centred
    a_m    = softmax(y_m), its tokens in ONE order for the whole micro-batch: by their mass summed over all positions
    S, T   = the first 50 channels of student and teacher                            [P, 50]
    L_tok  = tokenmean  sum_c | S_c - T_c |  -  0.1 sum_c softmax(S)_c log softmax(T)_c
    L_seq  = samplemean Sinkhorn( softmax(S / 2), softmax(T / 2) )      between positions, L1 cost, eps 0.1
    L_s    = L_tok + 0.1 * 0.001 * L_seq
    L      = (1 - lam) L_SFT + lam * SUM_s w_s L_s

Numbers, order of the cross-entropy's arguments (the student weighs, the teacher is the code) and softmaxes over values
that are probabilities already are those of the authors' code. Different here: the K kept logits stand for the whole
vocabulary (a token that a position does not keep has mass 0), positions meet where both have read the same bytes,
and the order is that of a micro-batch.
"""

from __future__ import annotations

import numpy as np
import torch

from rayfuse.batch import Counts, FusionBatch
from rayfuse.config import MultiLevelOT
from rayfuse.losses import HeadOutput
from rayfuse.losses.transport import channels, sinkhorn_positions
from rayfuse.stages.distillation import distill, kept_ranks
from rayfuse.stages.tensors import on_device


def multilevelot_loss(
    stage: MultiLevelOT, head: HeadOutput, batch: FusionBatch, totals: Counts
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """This micro-batch's share of the global batch's loss; `loss_ot/TEACHER` is L_s."""

    def distance(s: int) -> torch.Tensor:
        target = batch.targets[s]
        assert target.teacher_ids is not None
        rows_P = on_device(target.rows, head.topk.device)
        tokens_Pk = on_device(target.teacher_ids, rows_P.device)
        student_Pk, teacher_Pk = (_scaled(values) for values in kept_ranks(head, batch, s))
        S_PC = channels(student_Pk, head.ids[rows_P], stage.channels)
        T_PC = channels(teacher_Pk, tokens_Pk, stage.channels)
        token_P = (S_PC - T_PC).abs().sum(1) - stage.ce_weight * (S_PC.softmax(1) * T_PC.log_softmax(1)).sum(1)
        lengths = np.bincount(batch.sample[target.rows], minlength=len(batch.input_ids)).tolist()
        sequence_B = sinkhorn_positions((T_PC / 2).softmax(1), (S_PC / 2).softmax(1), lengths, 0.1, 10)
        of_samples_B = stage.sequence_weight * 0.001 * sequence_B * (totals.pairs[s] / totals.samples)
        return torch.cat((token_P, of_samples_B))

    return distill(stage, head, batch, totals, "loss_ot", distance)


def _scaled(values_Pk: torch.Tensor) -> torch.Tensor:
    """Softmax of the kept logits divided by their deviation."""
    return (values_Pk / (values_Pk.std(dim=1, keepdim=True) + 1e-4)).softmax(dim=1)
