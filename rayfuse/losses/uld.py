"""Universal logit distillation: compare two distributions rank by rank, whatever their vocabularies are.

Shapes: N aligned positions, K values per position (the Top-K of each model, or its whole vocabulary).
"""

from typing import Literal

import torch
from torch.nn import functional as F

from rayfuse.errors import LossError
from rayfuse.losses.standardize import standardize


def uld_loss(
    student: torch.Tensor,
    teacher: torch.Tensor,
    *,
    standardized: bool = True,
    space: Literal["logits", "probs"] = "logits",
) -> torch.Tensor:
    """Mean over positions of the L1 distance between rank i of the student and rank i of the teacher.

    student, teacher: [N, K] logits. Each side is sorted descending here, and the teacher is detached. `standardized`
    z-scores the K values of a row; `space="probs"` compares the softmax of them instead of the values. With either, a
    constant added to a row changes nothing, so that a teacher's log-probabilities serve as well as its logits. With
    neither, values are compared as they are: pass both sides in one gauge, log-probabilities against log-probabilities.
    Returns a float32 scalar; no positions give a zero that still has a graph. O(N K log K).

    With `space="probs"` and `standardized=False` the two sides may differ in width: the narrower is filled with zeros
    after sorting. On whole vocabularies that is the original ULD loss (Boizard et al. 2024, arXiv 2402.12030, eq. 2).

    Raises LossError on shapes that do not match, on an unknown space, on values that are not finite, and, when
    standardising, on K < 3: two z-scored values are +0.71 and -0.71 whatever they were, so that nothing is compared.

    Paper: InfiFusion (arXiv 2501.02795), Top-K selection, logit standardisation and ULD, for one teacher.
    """
    gaps_NK = _gaps(student, teacher, standardized, space)
    return gaps_NK.sum() / max(len(gaps_NK), 1)


def uld_distances(
    student: torch.Tensor,
    teacher: torch.Tensor,
    *,
    standardized: bool = True,
    space: Literal["logits", "probs"] = "logits",
) -> torch.Tensor:
    """The distance at each position [N] float32, of which uld_loss is the mean; arguments and errors as there."""
    return _gaps(student, teacher, standardized, space).sum(dim=-1)


def _gaps(
    student: torch.Tensor, teacher: torch.Tensor, standardized: bool, space: Literal["logits", "probs"]
) -> torch.Tensor:
    """The absolute difference of each rank [N, K]."""
    _check(student, teacher, standardized, space)
    teacher = teacher.detach()
    ranks = []
    for values in (student, teacher):
        promoted = values.to(torch.promote_types(values.dtype, torch.float32))
        promoted = promoted.sort(dim=-1, descending=True).values
        promoted = standardize(promoted) if standardized else promoted
        ranks.append(promoted.softmax(dim=-1) if space == "probs" else promoted)
    student_NK, teacher_NK = ranks
    missing = teacher_NK.shape[1] - student_NK.shape[1]
    if missing:
        student_NK = F.pad(student_NK, (0, max(missing, 0)))
        teacher_NK = F.pad(teacher_NK, (0, max(-missing, 0)))
    return (student_NK - teacher_NK).abs()


def _check(student: torch.Tensor, teacher: torch.Tensor, standardized: bool, space: str) -> None:
    if space not in ("logits", "probs"):
        raise LossError(f"uld_loss: space is {space!r}, it must be 'logits' or 'probs'")
    if student.ndim != 2 or teacher.ndim != 2 or len(student) != len(teacher):
        raise LossError(
            f"uld_loss compares [N, K] with [N, K], got student {tuple(student.shape)} and teacher "
            f"{tuple(teacher.shape)}: pass the rows that rayfuse.alignment.align pairs"
        )
    if student.shape[1] != teacher.shape[1] and (standardized or space == "logits"):
        raise LossError(
            f"uld_loss: the student has {student.shape[1]} values per position and the teacher {teacher.shape[1]}; "
            "keep the same k on both sides (only space='probs' with standardized=False fills up with zeros)"
        )
    for name, values in (("student", student), ("teacher", teacher)):
        if not torch.isfinite(values).all():
            rows = (~torch.isfinite(values)).any(dim=-1).nonzero()[:, 0].tolist()
            raise LossError(f"uld_loss: the {name}'s values are not finite in rows {rows[:8]} of {len(values)}")
    if standardized and student.shape[1] == 2:
        raise LossError(
            "uld_loss: two z-scored values are always +0.71 and -0.71, so that the distance is zero whatever the "
            "models say; keep k >= 3 values, or standardized=False"
        )
