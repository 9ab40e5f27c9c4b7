"""The distillation tax: the fused head with every loss on its top-K, against cross-entropy alone.

    python jobs/bench/head.py [--positions 512] [--hidden 896] [--vocab 100352] [--runs 5] [--device cpu] [--quick]

Every case starts at the last hidden states and ends with the gradients of hidden states and head weight.
"""

import argparse
from collections.abc import Callable
from typing import Any

import torch
from measure import alternate, machine
from torch.nn import functional as F

from rayfuse.losses import fused_head, gauge, gld_distance, gld_features, uld_loss
from rayfuse.losses.head import chunk_size, chunks

K = 10


def plain_chunked(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Cross-entropy over the fused head's own chunks, torch's kernels and autograd inside each; sums the gradients."""
    total = torch.zeros((), device=hidden.device)
    for rows in chunks(hidden, len(weight), None):
        chunk = hidden[rows].detach().requires_grad_()
        loss = F.cross_entropy(F.linear(chunk, weight).float(), labels[rows], reduction="sum") / len(hidden)
        loss.backward()
        total += loss.detach()
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--positions", type=int, default=512)
    parser.add_argument("--hidden", type=int, default=896)
    parser.add_argument("--vocab", type=int, default=100_352)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, numbers without meaning")
    args = parser.parse_args()
    if args.quick:
        args.positions, args.hidden, args.vocab, args.runs = 16, 16, 2000, 1
    options = {"device": args.device, "dtype": getattr(torch, args.dtype)}
    torch.manual_seed(0)
    hidden = torch.randn(args.positions, args.hidden, **options).requires_grad_()
    weight = (torch.randn(args.vocab, args.hidden, **options) / args.hidden**0.5).requires_grad_()
    labels = torch.randint(args.vocab, (args.positions,), device=args.device)
    teacher = torch.randn(args.positions, K, device=args.device).mul(3).sort(-1, descending=True).values
    sample = torch.arange(args.positions, device=args.device) * 4 // args.positions
    teacher_features = gld_features(gauge(teacher), sample, 4)

    def step(losses: Callable[..., torch.Tensor]) -> None:
        loss = losses()
        if loss.requires_grad:
            loss.backward()
        hidden.grad = weight.grad = None

    def fused(distil: bool) -> torch.Tensor:
        out = fused_head(hidden, weight, labels, K)
        if not distil:
            return out.loss_ce
        gld = gld_distance(gld_features(gauge(out.topk), sample, 4), teacher_features).mean()
        return 0.5 * out.loss_ce + 0.5 * (uld_loss(out.topk, teacher) + gld)

    cases: dict[str, Callable[[], Any]] = {
        "full logits, cross-entropy": lambda: step(lambda: F.cross_entropy((hidden @ weight.T).float(), labels)),
        "plain chunked cross-entropy": lambda: step(lambda: plain_chunked(hidden, weight, labels)),
    }
    if hasattr(torch.nn, "LinearCrossEntropyOptions"):
        # Its own choice of chunk (chunking_method "auto") is a few rows here and ten times slower on a CPU.
        chunking = torch.nn.LinearCrossEntropyOptions(
            chunking_method=None, batch_chunk_size=chunk_size(args.vocab, args.device)
        )
        cases["torch linear_cross_entropy, our chunk"] = lambda: step(
            lambda: F.linear_cross_entropy(hidden, weight, labels, options=chunking)
        )
    if args.device == "cuda":
        try:
            from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

            cases["Liger"] = lambda: step(lambda: liger_fused_linear_cross_entropy(hidden, weight, labels))
        except ImportError:
            print("liger_kernel is not installed: left out")
    peers = list(cases)
    cases["fused head, cross-entropy only"] = lambda: step(lambda: fused(False))
    cases["fused head, CE + ULD + GLD"] = lambda: step(lambda: fused(True))

    print(machine())
    print(f"positions {args.positions}, hidden {args.hidden}, vocabulary {args.vocab}, k {K}, {args.dtype}")
    results = alternate(cases, args.runs, args.device)
    best = min(results[name][0] for name in peers if name != "full logits, cross-entropy")
    for name, (milliseconds, memory) in results.items():
        print(
            f"{name:<40} {milliseconds:9.1f} ms  {memory:8.0f} MiB extra  {milliseconds / best:5.2f} x best chunked CE"
        )


if __name__ == "__main__":
    main()
