"""Divergences between a teacher and a student on a few cells of the vocabulary and one bucket for the rest.

Shapes: N positions, M picked tokens, C = M + 1 columns: the cells, then the rest.

A support is a set of cells, and a cell a set of student tokens. With p the student's probabilities over its whole
vocabulary and q what the teacher gives to each cell, both have the column `rest` for what no cell holds:

    p_c = SUM_{v in c} p(v)        p_rest = 1 - SUM_c p_c        q_rest = 1 - SUM_c q_c

    forward   KL(q || p)                                              Hinton et al., arXiv 1503.02531
    reverse   KL(p || q)                                              MiniLLM, arXiv 2306.08543
    jsd       1/2 KL(q || m) + 1/2 KL(p || m),  m = (p + q) / 2       GKD, arXiv 2306.13649, beta 1/2

Merging tokens into cells can only lower a divergence (data processing inequality), and where every token of the
vocabulary is a cell of its own, these are the divergences over the whole vocabulary. Which tokens are in the support is
data: no gradient goes through the choice, whose gradient would be biased (arXiv 2605.11182).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from rayfuse.errors import LossError

UNUSED = -1
"""Cell of a pick that is in no cell."""


def cell_logps(picked_NM: torch.Tensor, lse_N: torch.Tensor, cells_NM: torch.Tensor) -> torch.Tensor:
    """The student's log-probabilities [N, C] of the cells and of the rest.

    Columns that no pick belongs to hold the logarithm of the smallest number of the dtype.

    Args:
        picked_NM: logits of the picked tokens, each token at most once per row among those with a cell.
        lse_N: log-sum-exp over the whole vocabulary.
        cells_NM: int64, the column of each pick's cell, below M; UNUSED: in none.
    """
    if picked_NM.shape != cells_NM.shape or lse_N.shape != picked_NM.shape[:1]:
        raise LossError(
            f"picked {tuple(picked_NM.shape)} and cells {tuple(cells_NM.shape)} must have one shape [N, M], and lse "
            f"{tuple(lse_N.shape)} the shape [N]"
        )
    kind = torch.finfo(picked_NM.dtype)
    chances_NM = (picked_NM - lse_N[:, None]).exp() * (cells_NM != UNUSED)
    cells_NC = torch.zeros_like(chances_NM).scatter_add(1, cells_NM.clamp_min(0), chances_NM)
    rest_N1 = (1 - cells_NC.sum(1, keepdim=True)).clamp_min(kind.eps)
    return torch.cat([cells_NC.clamp_min(kind.tiny), rest_N1], 1).log()


def used_columns(cells_NM: torch.Tensor) -> torch.Tensor:
    """Bool [N, C]: the columns that hold a pick, and the rest."""
    here_NM = (cells_NM != UNUSED).to(torch.int8)
    used_NM = torch.zeros_like(here_NM).scatter_reduce(1, cells_NM.clamp_min(0), here_NM, "amax")
    return torch.cat([used_NM, torch.ones_like(used_NM[:, :1])], 1).bool()


def divergences(
    kind: str, logp_NC: torch.Tensor, mass_NM: torch.Tensor, used_NC: torch.Tensor, bound: float
) -> torch.Tensor:
    """The divergence [N] at each position, in nats, between 0 and `bound`.

    A teacher keeps at least exp(-bound) of its mass in every column, so that no logarithm of a ratio is far above the
    bound. Where a value is above it still (a forward KL whose student gives a cell almost nothing), value and gradient
    are scaled down to it: the gradient keeps its direction.

    Args:
        kind: a key of DIVERGENCES.
        logp_NC: the student's, see cell_logps.
        mass_NM: the teacher's probabilities of the cells.
        used_NC: see used_columns; the other columns do not count.
        bound: of a position's loss.
    """
    rest_N1 = 1 - mass_NM.sum(1, keepdim=True)
    floored_NC = torch.cat([mass_NM, rest_N1], 1).clamp_min(math.exp(-bound)) * used_NC
    teacher_NC = floored_NC / floored_NC.sum(1, keepdim=True)
    logq_NC = teacher_NC.masked_fill(~used_NC, 1.0).log()
    values_N = DIVERGENCES[kind](logq_NC, logp_NC.masked_fill(~used_NC, 0.0), used_NC)
    return values_N * (bound / values_N.detach().clamp_min(bound))


def _kl(logq_NC: torch.Tensor, logp_NC: torch.Tensor, used_NC: torch.Tensor) -> torch.Tensor:
    """KL(q || p) of each row."""
    return (logq_NC.exp() * (logq_NC - logp_NC) * used_NC).sum(1)


def _jsd(logq_NC: torch.Tensor, logp_NC: torch.Tensor, used_NC: torch.Tensor) -> torch.Tensor:
    logm_NC = torch.logaddexp(logq_NC, logp_NC) - math.log(2)
    return (_kl(logq_NC, logm_NC, used_NC) + _kl(logp_NC, logm_NC, used_NC)) / 2


DIVERGENCES: dict[str, Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "jsd": _jsd,
    "reverse": lambda logq, logp, used: _kl(logp, logq, used),
    "forward": _kl,
}
"""Divergence by its name, of (log q, log p, used)."""


def advantage_losses(
    logps_N: torch.Tensor, chunks_N: torch.Tensor, teacher_N: torch.Tensor, bound: float
) -> torch.Tensor:
    """The policy-gradient loss [N] of a token in its chunk, where there is no distribution to compare with.

    A chunk is what both models wrote between two byte boundaries that they share (arXiv 2606.09456):

        A_c = log P_teacher(c) - SUM_{t in c} log p(y_t)        within +- bound, without gradient
        loss_t = - A_c log p(y_t)

    Its expectation over the student's own texts has the gradient of KL(p || q) of the chunk.

    Args:
        logps_N: the student's log-probabilities of its tokens, differentiable.
        chunks_N: int64, the chunk of each token, below N; UNUSED: in none, and the loss is 0.
        teacher_N: the teacher's log-probability of the whole chunk, the same at all of its tokens.
        bound: of the advantage, in nats.
    """
    inside_N = chunks_N != UNUSED
    index_N = chunks_N.clamp_min(0)
    of_chunk = torch.zeros_like(logps_N).index_add(0, index_N, logps_N.detach() * inside_N)
    advantage_N = (teacher_N - of_chunk[index_N]).clamp(-bound, bound)
    return -advantage_N * logps_N * inside_N
