"""Cross-entropy against a mixture of the written text and the teachers' target."""

from __future__ import annotations

import torch

from rayfuse.batch import Counts, FusionBatch
from rayfuse.config import ByteKD, FuseChat, FuseLLM
from rayfuse.losses import HeadOutput
from rayfuse.stages.sft import sft_loss
from rayfuse.stages.tensors import on_device


def mixed_target_loss(
    stage: ByteKD | FuseLLM | FuseChat, head: HeadOutput, batch: FusionBatch, totals: Counts
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The loss above, for whatever made the teachers' mass q on `batch.picks`."""
    assert head.picked is not None
    assert batch.mass is not None
    sft, parts = sft_loss(stage, head, batch, totals)
    q_NM = on_device(batch.mass, head.picked.device)
    gap_N = head.picked[:, 0] - (q_NM * head.picked).sum(1)
    negentropy_N = torch.xlogy(q_NM, q_NM).sum(1)
    if batch.row_weights is not None:
        weights_N = on_device(batch.row_weights, gap_N.device)
        gap_N, negentropy_N = gap_N * weights_N, negentropy_N * weights_N
    gap = gap_N.sum() / totals.tokens
    parts["loss_kl"] = (sft + gap).detach() + negentropy_N.sum() / totals.tokens
    parts["label_mass"] = q_NM[:, 0].sum() / totals.tokens
    return sft + stage.lam * gap, parts
