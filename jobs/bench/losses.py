"""What ULD costs: rayfuse on the fused head's top-K, against TRL 1.16's ULDLoss on full logits.

    python jobs/bench/losses.py [--positions 128 256] [--hidden 512] [--runs 3]

Every case starts at the student's last hidden states, holds cross-entropy plus distillation, and ends with the
gradients of hidden states and head weight. The teacher's answer is ready in each: [N, V] logits for TRL, top-K for
rayfuse. "extra" is what distillation adds to the cross-entropy of the same kind of head.
"""

import argparse
import os
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from measure import alternate, machine
from torch.nn import functional as F

from rayfuse.alignment import align
from rayfuse.losses import fused_head, uld_loss

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
STUDENT_VOCAB, TEACHER_VOCAB, SHARED, K = 100_352, 151_936, 0.7, 10


def trl_loss(extended: bool, hybrid: bool) -> Any:
    """TRL's ULDLoss with distillation only; SHARED of the student's token strings are the teacher's too."""
    from trl.experimental.gold.gold_trainer import ULDLoss

    vocabularies = [
        SimpleNamespace(
            get_vocab=lambda: {f"t{i}" if i < SHARED * STUDENT_VOCAB else f"s{i}": i for i in range(STUDENT_VOCAB)}
        ),
        SimpleNamespace(get_vocab=lambda: {f"t{i}": i for i in range(TEACHER_VOCAB)}),
    ]
    config = SimpleNamespace(
        uld_crossentropy_weight=0.0,
        uld_distillation_weight=1.0,
        uld_student_temperature=1.0,
        uld_teacher_temperature=1.0,
        uld_skip_student_eos=False,
        uld_skip_teacher_eos=False,
        use_extended_uld=extended,
        uld_token_merge_strategy="observed",
        uld_use_hybrid_loss=hybrid,
        uld_hybrid_matched_weight=None,
        uld_hybrid_unmatched_weight=None,
        beta=0.5,
    )
    return ULDLoss(config, *vocabularies)


def token_ends(positions: int, generator: np.random.Generator) -> np.ndarray:
    """Byte ends of a response of 4 * positions bytes cut at random into `positions` tokens."""
    inner = generator.choice(4 * positions - 1, positions - 1, replace=False) + 1
    return np.append(np.sort(inner), 4 * positions)


def compare(positions: int, hidden_size: int, runs: int) -> None:
    torch.manual_seed(0)
    hidden = torch.randn(positions, hidden_size).requires_grad_()
    weight = (torch.randn(STUDENT_VOCAB, hidden_size) * 3 / hidden_size**0.5).requires_grad_()
    labels = torch.randint(STUDENT_VOCAB, (positions,))
    teacher_logits = torch.randn(positions, TEACHER_VOCAB) * 3
    teacher_topk = teacher_logits.topk(K).values
    teacher_ids = torch.randint(TEACHER_VOCAB, (1, positions))
    generator = np.random.default_rng(0)
    ends = [token_ends(positions, generator) for _ in range(2)]
    student_offsets, teacher_offsets = (
        torch.from_numpy(np.stack((np.concatenate(([0], end[:-1])), end), axis=1)) for end in ends
    )

    def step(loss: torch.Tensor) -> None:
        loss.backward()
        hidden.grad = weight.grad = None

    def full_logits(trl: Any = None) -> None:
        logits = hidden @ weight.T
        loss = F.cross_entropy(logits, labels)
        if trl is not None:
            arguments = (logits[None], teacher_logits[None], labels[None], teacher_ids, labels[None], teacher_ids)
            loss = loss + trl(*arguments, student_offsets[None], teacher_offsets[None])
        step(loss)

    def fused(distil: bool, aligned: bool = True) -> None:
        out = fused_head(hidden, weight, labels, K)
        loss = out.loss_ce
        if distil and aligned:
            pairs = align(*ends)  # the last pair predicts the end of turn, which TRL is not given either
            loss = loss + uld_loss(out.topk[pairs.student[:-1]], teacher_topk[pairs.teacher[:-1]])
        elif distil:
            loss = loss + uld_loss(out.topk, teacher_topk)
        step(loss)

    cases: dict[str, Callable[[], Any]] = {
        "full logits, cross-entropy only": full_logits,
        "TRL ULD by position": partial(full_logits, trl_loss(False, False)),
        "TRL ULD extended (aligned)": partial(full_logits, trl_loss(True, False)),
        "TRL ULD extended, hybrid": partial(full_logits, trl_loss(True, True)),
        "fused head, cross-entropy only": lambda: fused(False),
        "rayfuse ULD by position": lambda: fused(True, False),
        "rayfuse ULD aligned": lambda: fused(True),
    }
    results = alternate(cases, runs)
    ours = results["rayfuse ULD aligned"][0]
    print(f"N {positions}: ms per step, extra ms per position, extra MiB, time over rayfuse aligned")
    for name, (milliseconds, memory) in results.items():
        alone = results[("fused head" if "rayfuse" in name else "full logits") + ", cross-entropy only"][0]
        extra = "" if "only" in name else f"{(milliseconds - alone) / positions:8.3f}"
        print(f"  {name:<34} {milliseconds:9.1f} ms {extra:>9}  {memory:8.0f} MiB  {milliseconds / ours:6.2f} x")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--positions", type=int, nargs="+", default=[128, 256])
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--runs", type=int, default=3)
    args = parser.parse_args()
    print(machine())
    print(f"student vocabulary {STUDENT_VOCAB}, teacher {TEACHER_VOCAB}, k {K}, hidden {args.hidden}, float32")
    for positions in args.positions:
        compare(positions, args.hidden, args.runs)


if __name__ == "__main__":
    main()
