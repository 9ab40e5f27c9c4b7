"""Gromov-Wasserstein between two logit graphs: the sorted closed form, against POT exact and entropic.

    python jobs/bench/gw.py [--nodes 10 50 100 200 512] [--runs 3]

Values are those of one objective, Memoli's GW_1 = sum |C_ij - D_pq| T_ip T_jq: the closed form divided by n is a lower
bound of it, each of POT's couplings (found for the square loss, which is what POT solves) an upper bound; "gap" is
their ratio. The objective is evaluated up to n = 100 (it costs n^4).
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

POSITIONS = 256


def objective(C: np.ndarray, D: np.ndarray, coupling: np.ndarray) -> float:
    """GW_1 of a coupling, one row of C at a time so that n^3 values are in memory and not n^4."""
    rows = (
        np.einsum("jpq,p,jq->", np.abs(C[i][:, None, None] - D[None]), coupling[i], coupling) for i in range(len(C))
    )
    return float(sum(rows))


def graph(values: torch.Tensor) -> np.ndarray:
    unit = values / values.norm(dim=0)
    return (unit.T @ unit).double().numpy()


def compare(nodes: int, runs: int) -> None:
    torch.manual_seed(nodes)
    student, teacher = (gauge(torch.randn(POSITIONS, nodes).mul(3).sort(-1, descending=True).values) for _ in range(2))
    sample = torch.zeros(POSITIONS, dtype=torch.int64)
    uniform = np.full(nodes, 1 / nodes)
    found: dict[str, np.ndarray] = {}

    def closed_form() -> torch.Tensor:
        return gld_distance(gld_features(student, sample, 1), gld_features(teacher, sample, 1))[0]

    def exact() -> None:
        found["POT exact"] = ot.gromov.gromov_wasserstein(graph(student), graph(teacher), uniform, uniform)

    def entropic() -> None:
        found["POT entropic"] = ot.gromov.entropic_gromov_wasserstein(
            graph(student), graph(teacher), uniform, uniform, epsilon=5e-3, max_iter=200
        )

    cases: dict[str, Callable[[], Any]] = {"closed form": closed_form, "POT exact": exact, "POT entropic": entropic}
    results = alternate(cases, runs)
    bound = closed_form().item() / nodes
    for name, (milliseconds, memory) in results.items():
        text = f"n {nodes:<4} {name:<13} {milliseconds:10.2f} ms  {milliseconds / results['closed form'][0]:8.1f} x"
        if name == "closed form":
            text += f"   GW~/n {bound:.5f}"
        elif nodes <= 100:
            value = objective(graph(student), graph(teacher), found[name])
            text += f"   GW_1 {value:.5f}   gap {value / bound:.2f} x"
        print(text + f"   {memory:.0f} MiB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, nargs="+", default=[10, 50, 100, 200, 512])
    parser.add_argument("--runs", type=int, default=9)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    print(machine())
    start = time.perf_counter()
    for nodes in args.nodes:
        compare(nodes, args.runs)
    print(f"{time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
