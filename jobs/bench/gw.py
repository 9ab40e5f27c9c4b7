"""Gromov-Wasserstein between logit graphs: the sorted closed form against POT exact, entropic and batched.

    python jobs/bench/gw.py [--nodes 10 50 100 200 512] [--samples 8] [--runs 3]

Every case starts at the values [L, n] of `--samples` responses and gives one distance per response; times are for all
of them, in processor milliseconds of one thread. The closed form and POT's batched solver take them at once, POT's
other solvers one by one. Values are those of one objective, Memoli's GW_1 = sum |C_ij - D_pq| T_ip T_jq, of the first
response: the closed form divided by n is a lower bound of it, each of POT's couplings (found for the square loss, which
is what POT solves) an upper bound; "gap" is their ratio. The objective costs n^4: beyond 64 nodes it is the mean over 2
million draws of pairs from the coupling, with its standard error.
"""

import argparse
import time
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import ot
import torch
from measure import alternate, machine

from rayfuse.losses import gauge, gld_distance, gld_features

POSITIONS, EXACT_UP_TO, DRAWS = 256, 64, 2_000_000


def objective(C: np.ndarray, D: np.ndarray, coupling: np.ndarray) -> tuple[float, float]:
    """GW_1 of a coupling and its standard error: an expectation over two independent pairs (i, p), (j, q) from it."""
    n = len(C)
    if n <= EXACT_UP_TO:
        rows = (np.einsum("jpq,p,jq->", np.abs(C[i][:, None, None] - D[None]), coupling[i], coupling) for i in range(n))
        return float(sum(rows)), 0.0
    cumulative = np.cumsum(coupling.ravel())
    drawn = np.searchsorted(cumulative, np.random.default_rng(0).random((2, DRAWS)) * cumulative[-1], side="right")
    (i, j), (p, q) = np.divmod(np.minimum(drawn, n * n - 1), n)
    costs = np.abs(C[i, j] - D[p, q])
    return float(costs.mean()), float(costs.std() / DRAWS**0.5)


def graphs(values_BLn: torch.Tensor) -> np.ndarray:
    """The cosine graphs [B, n, n] themselves, which the closed form never makes."""
    unit = values_BLn / values_BLn.norm(dim=1, keepdim=True)
    return (unit.mT @ unit).double().numpy()


def compare(nodes: int, samples: int, runs: int) -> None:
    torch.manual_seed(nodes)
    student, teacher = (
        gauge(torch.randn(samples, POSITIONS, nodes).mul(3).sort(-1, descending=True).values) for _ in range(2)
    )
    sample = torch.arange(samples).repeat_interleave(POSITIONS)
    uniform = np.full(nodes, 1 / nodes)
    found: dict[str, np.ndarray] = {}

    def closed_form() -> torch.Tensor:
        return gld_distance(*(gld_features(side.flatten(0, 1), sample, samples) for side in (student, teacher)))

    def one_by_one(name: str, solve: Callable[..., np.ndarray], **options: Any) -> None:
        pairs = zip(graphs(student), graphs(teacher), strict=True)
        couplings = [solve(C, D, uniform, uniform, **options) for C, D in pairs]
        found[name] = couplings[0]

    def batched() -> None:
        found["POT batched"] = ot.solve_gromov_batch(graphs(student), graphs(teacher), reg=5e-3, max_iter=200).plan[0]

    cases: dict[str, Callable[[], Any]] = {
        "closed form": closed_form,
        "POT exact": lambda: one_by_one("POT exact", ot.gromov.gromov_wasserstein),
        "POT entropic": lambda: one_by_one(
            "POT entropic", ot.gromov.entropic_gromov_wasserstein, epsilon=5e-3, max_iter=200
        ),
        "POT batched": batched,
    }
    results = alternate(cases, runs, clock=time.process_time)
    bound = closed_form()[0].item() / nodes
    for name, (milliseconds, memory) in results.items():
        text = f"n {nodes:<4} {name:<13} {milliseconds:10.2f} ms  {milliseconds / results['closed form'][0]:8.1f} x"
        if name == "closed form":
            text += f"   GW~/n {bound:.5f}"
        else:
            value, error = objective(graphs(student)[0], graphs(teacher)[0], found[name])
            spread = f" +- {error:.5f}" if error else ""
            text += f"   GW_1 {value:.5f}{spread}   gap {value / bound:.2f} x"
        print(text + f"   {memory:.0f} MiB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, nargs="+", default=[10, 50, 100, 200, 512])
    parser.add_argument("--samples", type=int, default=8, help="responses, as in a unit")
    parser.add_argument("--runs", type=int, default=3, help="rounds; the median counts")
    parser.add_argument("--quick", action="store_true", help="a few seconds, numbers without meaning")
    args = parser.parse_args()
    if args.quick:
        args.nodes, args.samples, args.runs = [5, 70], 2, 1
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    print(machine())
    start = time.perf_counter()
    for nodes in args.nodes:
        compare(nodes, args.samples, args.runs)
    print(f"{time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
