"""Trust-weighted fine-tuning (ours): cross-entropy in which a sample counts as much as its surest teacher believes it.

    r_s(y) = (1/|y|_s) log P_s(y|x)              per token of teacher s's own, end-of-turn counted
    w(y)   = max_s v_s exp(trust * r_s(y))       in (0, 1]; v_s: the teacher's weight over the largest one's
    L      = tokenmean - w(y) log P_student(y_t | x, y_<t)

Nothing is compared token by token, so the tokenizers need no alignment: the teachers only say whether they would have
written the text. A response that no teacher believes, as a wrong one, hardly counts; one that a single expert believes
counts fully, whatever the others say. trust 0 is SFT.
"""

from __future__ import annotations

import torch

from rayfuse.batch import Counts, FusionBatch
from rayfuse.config import Trust
from rayfuse.stages.tensors import on_device


def trust_loss(
    stage: Trust, logps_N: torch.Tensor, batch: FusionBatch, totals: Counts
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """This micro-batch's share of the global batch's loss, from the student's log-probabilities [N] of the labels.

    `trusted` in the parts is the mean weight of the samples.
    """
    weights_B = sample_weights(stage, batch).to(logps_N.device)
    weights_N = weights_B[on_device(batch.sample, logps_N.device)]
    parts = {"loss_sft": -logps_N.detach().sum() / totals.tokens, "trusted": weights_B.sum() / totals.samples}
    return -(weights_N * logps_N).sum() / totals.tokens, parts


def sample_weights(stage: Trust, batch: FusionBatch) -> torch.Tensor:
    """w [B] float32 of each sample."""
    per_token = []
    for target in batch.targets:
        assert target.response_logps is not None
        assert target.response_tokens is not None
        per_token.append(torch.from_numpy(target.response_logps / target.response_tokens))
    weights_S1 = torch.tensor([[target.weight] for target in batch.targets])
    return torch.exp((stage.trust * torch.stack(per_token) + (weights_S1 / weights_S1.max()).log()).amax(0))
