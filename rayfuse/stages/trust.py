"""Trust-weighted fine-tuning (ours): cross-entropy in which a sample counts as much as its surest teacher believes it.

    r_s(y) = (1/|y|_s) log P_s(y|x)              per token of teacher s's own, end-of-turn counted
    w(y)   = max_s v_s exp(trust * r_s(y))       in (0, 1]; v_s: the teacher's weight over the largest one's
    L      = tokenmean - w(y) log P_student(y_t | x, y_<t)

Nothing is compared token by token, so the tokenizers need no alignment: the teachers only say whether they would have
written the text. A response that no teacher believes, as a wrong one, hardly counts; one that a single expert believes
counts fully, whatever the others say. trust 0 is SFT.

With teacher_weights: consensus v_s is times p_sb, how probably teacher s is right on this prompt, and the whole times
min(1, SUM_s p_sb): where nobody knows, a sample counts little. sample_weights: consensus multiplies w(y) by how
probably the response is right.
"""

from __future__ import annotations

import numpy as np
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
    """w [B] float32 of each sample; 0 where no teacher counts."""
    per_token = []
    for target in batch.targets:
        assert target.response_logps is not None
        assert target.response_tokens is not None
        per_token.append(torch.from_numpy(target.response_logps / target.response_tokens))
    here = [np.ones(len(batch.input_ids)) if t.sample_weights is None else t.sample_weights for t in batch.targets]
    weights_SB = torch.from_numpy(
        np.stack([target.weight * of_teacher for target, of_teacher in zip(batch.targets, here, strict=True)])
    ).float()
    most_B = weights_SB.amax(0)
    shares_SB = weights_SB / torch.where(most_B > 0, most_B, 1.0)
    trust_B = torch.exp((stage.trust * torch.stack(per_token) + shares_SB.log()).amax(0))
    for factor_B in (batch.known(), batch.sample_weights):
        trust_B = trust_B if factor_B is None else trust_B * torch.from_numpy(factor_B)
    return trust_B
