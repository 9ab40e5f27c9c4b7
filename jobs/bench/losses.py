"""What ULD costs: rayfuse on the fused head's top-K, against TRL 1.16's ULDLoss and MultiLevelOT on full logits.

    python jobs/bench/losses.py [--positions 128 512 4096] [--student 100352 151936] [--hidden 512] [--runs 3]
        [--trl-up-to 512] [--threads 1] [--device cpu] [--dtype float32]

Every case starts at the student's last hidden states, holds cross-entropy plus distillation, and ends with the
gradients of hidden states and head weight. The teacher's answer is ready in each: [N, V] logits for TRL, top-K for
rayfuse. "extra" is what distillation adds to the cross-entropy of the same kind of head. The teacher has the other one
of the two vocabularies (Phi-4's 100,352 and Qwen's 151,936). With one thread, times are processor time. TRL's own time
per position grows with the length, and it holds several [N, V] tensors: beyond --trl-up-to positions it is left out,
and so is all else on full logits. Liger's fused JSD, on CUDA where it is installed, needs a teacher with the student's
vocabulary and its hidden states: it stands for what distillation costs where tokenizers agree.
"""

import argparse
import os
import time
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from measure import alternate, machine
from torch.nn import functional as F

from rayfuse.alignment.pairs import align
from rayfuse.losses import fused_head, uld_loss
from rayfuse.losses.transport import sinkhorn_positions

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
VOCABULARIES, SHARED, K = (100_352, 151_936), 0.7, 10


def trl_loss(student: int, teacher: int, extended: bool, hybrid: bool) -> Any:
    """TRL's ULDLoss with distillation only; SHARED of the student's token strings are the teacher's too."""
    from trl.experimental.gold.gold_trainer import ULDLoss

    vocabularies = [
        SimpleNamespace(get_vocab=lambda: {f"t{i}" if i < SHARED * student else f"s{i}": i for i in range(student)}),
        SimpleNamespace(get_vocab=lambda: {f"t{i}": i for i in range(teacher)}),
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


def multilevelot(student_NV: torch.Tensor, teacher_NV: torch.Tensor) -> torch.Tensor:
    """MultiLevelOT's formula (arXiv 2412.14528) on full logits, position by position, with its authors' constants."""
    both = (logits.float() for logits in (student_NV, teacher_NV))
    sides = [(logits / (logits.std(1, keepdim=True) + 1e-4)).softmax(1) for logits in both]
    S_NC, T_NC = (side[:, side.detach().sum(0).argsort(descending=True)[:50]] for side in sides)
    token = (S_NC - T_NC).abs().sum() - 0.1 * (S_NC.softmax(1) * T_NC.log_softmax(1)).sum()
    sequence = sinkhorn_positions((T_NC / 2).softmax(1), (S_NC / 2).softmax(1), [len(S_NC)], 0.1, 10)
    return token / len(S_NC) + 0.1 * 0.001 * sequence.sum()


def liger_jsd(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> Callable[[], torch.Tensor] | None:
    """Liger's fused linear JSD against a teacher of the student's own shape, or None where it is not to be had."""
    if hidden.device.type != "cuda":
        return None
    try:
        from liger_kernel.transformers import LigerFusedLinearJSD
    except ImportError:
        print("liger_kernel is not installed: left out")
        return None
    jsd, teacher = LigerFusedLinearJSD(), torch.randn_like(weight) * 3 / hidden.shape[1] ** 0.5
    return lambda: jsd(hidden, weight, hidden.detach(), teacher, labels)


def token_ends(positions: int, generator: np.random.Generator) -> np.ndarray:
    """Byte ends of a response of 4 * positions bytes cut at random into `positions` tokens."""
    inner = generator.choice(4 * positions - 1, positions - 1, replace=False) + 1
    return np.append(np.sort(inner), 4 * positions)


def compare(positions: int, student: int, hidden_size: int, runs: int, peers: bool, options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    (teacher,) = set(VOCABULARIES) - {student}
    device = str(options["device"])
    hidden = torch.randn(positions, hidden_size, **options).requires_grad_()
    weight = (torch.randn(student, hidden_size, **options) * 3 / hidden_size**0.5).requires_grad_()
    labels = torch.randint(student, (positions,), device=device)
    if peers:
        teacher_logits = torch.randn(positions, teacher, **options) * 3
        teacher_topk = teacher_logits.topk(K).values
    else:
        teacher_topk = torch.randn(positions, K, **options).sort(-1, descending=True).values * 3
    teacher_ids = torch.randint(teacher, (1, positions), device=device)
    generator = np.random.default_rng(0)
    ends = [token_ends(positions, generator) for _ in range(2)]
    student_offsets, teacher_offsets = (
        torch.from_numpy(np.stack((np.concatenate(([0], end[:-1])), end), axis=1)) for end in ends
    )

    def step(loss: torch.Tensor) -> None:
        loss.backward()
        hidden.grad = weight.grad = None

    def full_logits(trl: Any = None, multilevel: bool = False) -> None:
        logits = hidden @ weight.T
        loss = F.cross_entropy(logits, labels)
        if multilevel:
            loss = loss + multilevelot(logits, teacher_logits)
        if trl is not None:
            arguments = (logits[None], teacher_logits[None], labels[None], teacher_ids, labels[None], teacher_ids)
            loss = loss + trl(*arguments, student_offsets[None], teacher_offsets[None])
        step(loss)

    def fused(distil: bool, aligned: bool = True) -> None:
        out = fused_head(hidden, weight, labels, K)
        loss = out.loss_ce
        if distil and aligned:
            pairs = align(*ends)  # the last pair predicts the end of turn, which TRL is not given either
            rows = [torch.from_numpy(side[:-1]).to(device) for side in (pairs.student, pairs.teacher)]
            loss = loss + uld_loss(out.topk[rows[0]], teacher_topk[rows[1]])
        elif distil:
            loss = loss + uld_loss(out.topk, teacher_topk)
        step(loss)

    cases: dict[str, Callable[[], Any]] = {}
    if peers:
        cases["full logits, cross-entropy only"] = full_logits
        for name, how in (("by position", (False, False)), ("extended (aligned)", (True, False))):
            cases[f"TRL ULD {name}"] = partial(full_logits, trl_loss(student, teacher, *how))
        cases["TRL ULD extended, hybrid"] = partial(full_logits, trl_loss(student, teacher, True, True))
        cases["MultiLevelOT"] = partial(full_logits, multilevel=True)
    jsd = liger_jsd(hidden, weight, labels)
    if jsd is not None:
        cases["Liger fused JSD"] = lambda: step(jsd())
    cases["fused head, cross-entropy only"] = lambda: fused(False)
    cases["rayfuse ULD by position"] = lambda: fused(True, False)
    cases["rayfuse ULD aligned"] = lambda: fused(True)
    clock = time.process_time if torch.get_num_threads() == 1 and device == "cpu" else time.perf_counter
    results = alternate(cases, runs, device, clock)
    ours = results["rayfuse ULD aligned"][0]
    print(f"N {positions}, student {student:,}, teacher {teacher:,}: ms a step, extra ms a position, extra MiB, x ours")
    for name, (milliseconds, memory) in results.items():
        extra = ""
        if "only" not in name and "Liger" not in name:
            head = "fused head" if "rayfuse" in name else "full logits"
            extra = f"{(milliseconds - results[f'{head}, cross-entropy only'][0]) / positions:8.3f}"
        print(f"  {name:<34} {milliseconds:9.1f} ms {extra:>9}  {memory:8.0f} MiB  {milliseconds / ours:6.2f} x")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--positions", type=int, nargs="+", default=[128, 512, 4096])
    parser.add_argument("--student", type=int, nargs="+", default=list(VOCABULARIES), choices=VOCABULARIES)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--trl-up-to", type=int, default=512, help="positions up to which TRL is measured too")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of torch")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--quick", action="store_true", help="numbers without meaning")
    args = parser.parse_args()
    if args.quick:
        args.positions, args.student, args.hidden, args.runs, args.trl_up_to = [8, 16], [100_352], 16, 1, 8
    torch.set_num_threads(args.threads)
    options = {"device": args.device, "dtype": getattr(torch, args.dtype)}
    print(machine())
    print(f"k {K}, hidden {args.hidden}, {args.dtype}")
    for student in args.student:
        for positions in args.positions:
            compare(positions, student, args.hidden, args.runs, positions <= args.trl_up_to, options)


if __name__ == "__main__":
    main()
