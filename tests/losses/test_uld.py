"""ULD against TRL's own class, and the Top-K form against a loop written from the formula."""

import os

import pytest
import scipy.special
import scipy.stats
import torch

from rayfuse.errors import LossError
from rayfuse.losses import uld_loss

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")


def trl_uld(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """TRL's ULDLoss on [N, V] logits: position by position, no cross-entropy, every position part of the answer."""
    from types import SimpleNamespace

    from trl.experimental.gold.gold_trainer import ULDLoss

    config = SimpleNamespace(
        uld_crossentropy_weight=0.0,
        uld_distillation_weight=1.0,
        uld_student_temperature=1.0,
        uld_teacher_temperature=1.0,
        uld_skip_student_eos=False,
        uld_skip_teacher_eos=False,
        use_extended_uld=False,
        uld_token_merge_strategy="observed",
        uld_use_hybrid_loss=False,
    )
    ids = torch.zeros(1, len(student), dtype=torch.int64)
    return ULDLoss(config)(student[None], teacher[None], ids, ids, ids, ids)


@pytest.mark.parametrize(("student_vocab", "teacher_vocab"), [(211, 211), (211, 307), (307, 211)])
def test_full_vocabulary_equals_trl(student_vocab, teacher_vocab):
    generator = torch.Generator().manual_seed(0)
    student = (torch.randn(9, student_vocab, generator=generator) * 3).requires_grad_()
    teacher = torch.randn(9, teacher_vocab, generator=generator) * 3
    ours = uld_loss(student, teacher, standardized=False, space="probs")
    (gradient,) = torch.autograd.grad(ours, student)
    theirs = trl_uld(student, teacher)
    (their_gradient,) = torch.autograd.grad(theirs, student)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradient, their_gradient, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("standardized", [True, False])
@pytest.mark.parametrize("space", ["logits", "probs"])
def test_equals_the_formula(standardized, space):
    generator = torch.Generator().manual_seed(1)
    student, teacher = (torch.randn(6, 10, generator=generator, dtype=torch.float64) * 4 + 20 for _ in range(2))
    total = 0.0
    for row in zip(student, teacher, strict=True):
        sides = []
        for values in row:
            kept = scipy.stats.zscore(values.numpy(), ddof=1) if standardized else values.numpy()
            sides.append(sorted(scipy.special.softmax(kept) if space == "probs" else kept))
        total += sum(abs(a - b) for a, b in zip(*sides, strict=True))
    loss = uld_loss(student, teacher, standardized=standardized, space=space)
    assert loss.item() == pytest.approx(total / 6, rel=1e-6)


def test_is_zero_on_equal_shapes_of_distribution_and_blind_to_a_constant():
    values = torch.randn(5, 10, generator=torch.Generator().manual_seed(2)) * 3
    assert uld_loss(values, 2.0 * values.flip(-1) + 7.0).item() == pytest.approx(0.0, abs=1e-4)
    assert uld_loss(values, values + 7.0, standardized=False, space="probs").item() == pytest.approx(0.0, abs=1e-5)


def test_two_z_scored_values_are_refused_because_they_say_nothing():
    values = torch.randn(5, 2, generator=torch.Generator().manual_seed(5))
    for space in ("logits", "probs"):
        with pytest.raises(LossError, match=r"two z-scored values.*k >= 3"):
            uld_loss(values, values * 3 - 1, space=space)
    assert uld_loss(values, values + 1, standardized=False).item() == pytest.approx(2.0)


def test_gradient_reaches_the_student_only():
    generator = torch.Generator().manual_seed(3)
    student, teacher = (
        torch.randn(4, 6, generator=generator, dtype=torch.float64, requires_grad=True) for _ in range(2)
    )
    assert torch.autograd.gradcheck(lambda values: uld_loss(values, teacher), (student,))
    uld_loss(student, teacher).backward()
    assert teacher.grad is None


def test_half_precision_is_computed_in_float32():
    generator = torch.Generator().manual_seed(4)
    student, teacher = (torch.randn(4, 10, generator=generator).bfloat16() for _ in range(2))
    loss = uld_loss(student, teacher)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(uld_loss(student.double(), teacher.double()).item(), rel=1e-5)


def test_no_positions_give_a_zero_with_a_graph():
    student = torch.zeros(0, 10, requires_grad=True)
    loss = uld_loss(student, torch.zeros(0, 10))
    loss.backward()
    assert loss.item() == 0.0
    assert student.grad is not None


@pytest.mark.parametrize(
    ("student", "teacher", "options", "message"),
    [
        (torch.zeros(3, 10), torch.zeros(4, 10), {}, r"student \(3, 10\) and teacher \(4, 10\)"),
        (torch.zeros(3), torch.zeros(3), {}, r"\[N, K\]"),
        (torch.zeros(3, 10), torch.zeros(3, 9), {}, "the student has 10 values per position and the teacher 9"),
        (torch.zeros(3, 10), torch.zeros(3, 9), {"space": "probs"}, "the same k"),
        (torch.zeros(3, 10), torch.zeros(3, 9), {"standardized": False}, "the same k"),
        (torch.zeros(3, 1), torch.zeros(3, 1), {}, "at least 2 values"),
        (torch.zeros(3, 2), torch.zeros(3, 2), {"space": "log"}, "'log'"),
        (torch.full((3, 2), torch.nan), torch.zeros(3, 2), {}, "the student's values are not finite in rows .0, 1, 2"),
        (torch.zeros(3, 2), torch.full((3, 2), -torch.inf), {}, "the teacher's values are not finite"),
    ],
)
def test_refuses_what_it_cannot_compare(student, teacher, options, message):
    with pytest.raises(LossError, match=message):
        uld_loss(student, teacher, **options)
