"""How good the closed form of InfiGFusion is where it is used: on the graphs of the quickstart world's models.

    python jobs/bench/gw_world.py --world /tmp/world [--k 5 10] [--samples 60]

Student: the pivot, or any model of its tokenizer (--student). Each pair is one sample's graph under the student against
its graph under one teacher. Per k, the median over the pairs (and the quartiles):

  gap     GW_1 at the coupling that POT finds, over its lower bound GW~ / k, the closed form
  cosine  between the gradients of closed form and exact distance with respect to the student's kept logits of a sample
  unit    the same cosine for the sums over units of 8 samples and all teachers, what a micro-step follows
  swap    share of nodes that closed form and POT couple with different nodes

GW_1 is sum |C_ij - D_pq| T_ip T_jq; POT minimises the square. Exact is the mode `exact`, the closed form the mode
`closed`.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from measure import machine
from torch.nn.functional import cosine_similarity

from rayfuse.config import Data, Teacher
from rayfuse.data.rows import read_samples
from rayfuse.losses import gauge, gld_distance, gld_features, gld_graphs, gw_couplings, gw_distance
from rayfuse.quickstart.world import build_world
from rayfuse.teachers.transformers import TransformersTeacher

UNIT = 8
Side = tuple[torch.Tensor, torch.Tensor]


def side(signals: Sequence[np.ndarray], k: int) -> Side:
    """Top k of all samples end to end [N, k], and the sample of each row."""
    lengths = torch.tensor([len(rows) for rows in signals])
    values_Nk = torch.from_numpy(np.concatenate([rows[:, :k] for rows in signals])).float()
    return values_Nk, torch.repeat_interleave(torch.arange(len(signals)), lengths)


def compare(student: Side, teacher: Side, samples: int) -> tuple[dict[str, np.ndarray], list[torch.Tensor]]:
    """Gap and swapped share per sample, and both gradients [N, k] of the distances summed over the samples."""
    values_Nk, sample_N = student[0].clone().requires_grad_(), student[1]
    k = values_Nk.shape[1]
    features = [gld_features(gauge(v), s, samples) for v, s in ((values_Nk, sample_N), teacher)]
    graphs = [gld_graphs(gauge(v), s, samples) for v, s in ((values_Nk, sample_N), teacher)]
    closed_B = gld_distance(*features)
    coupling = torch.from_numpy(gw_couplings(*(graph.detach().double().numpy() for graph in graphs)))
    exact_B = gw_distance(*graphs, coupling)
    gradients = [torch.autograd.grad(distance.sum(), values_Nk)[0] for distance in (closed_B, exact_B)]
    gaps, swapped = [], []
    for C, D, T, closed in zip(
        *(graph.detach().double() for graph in graphs), coupling, closed_B.tolist(), strict=True
    ):
        gw_1 = torch.einsum("ijpq,ip,jq->", (C[:, :, None, None] - D[None, None]).abs(), T, T).item()
        gaps.append(gw_1 / (closed / k))
        partner = torch.empty(k, dtype=torch.int64)
        partner[C.mean(1).argsort()] = D.mean(1).argsort()
        swapped.append((T.argmax(1) != partner).double().mean().item())
    return {"gap": np.array(gaps), "swap": np.array(swapped)}, gradients


def per_sample(gradients: Sequence[torch.Tensor], sample_N: torch.Tensor, size: int = 1) -> np.ndarray:
    """Cosine of two gradients within each group of `size` samples."""
    group_N = sample_N // size
    groups = [group_N == g for g in range(int(group_N.max()) + 1)]
    return np.array([cosine_similarity(*(g[rows].flatten() for g in gradients), dim=0).item() for rows in groups])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--world", type=Path, required=True, help="cache folder of quickstart worlds; made if missing")
    parser.add_argument("--student", type=Path, help="model folder; default: the world's pivot")
    parser.add_argument("--k", type=int, nargs="+", default=[5, 10])
    parser.add_argument("--samples", type=int, default=60)
    args = parser.parse_args()
    torch.set_num_threads(1)
    world = build_world(args.world, progress=print)
    samples = read_samples(Data(path=str(world.evaluation)), first=args.samples * 10)[0][::10][: args.samples]
    models = {"student": args.student or world.pivot, **world.teachers}
    answers = {
        name: [
            signals.logps
            for signals in TransformersTeacher(Teacher(model=str(folder), dtype="float32"), max(args.k)).score(samples)
        ]
        for name, folder in models.items()
    }
    print(f"{machine()}\n{len(samples)} samples, student {models['student']}, teachers {', '.join(world.teachers)}")
    for k in args.k:
        student = side(answers["student"], k)
        totals: dict[str, list[np.ndarray]] = {"gap": [], "swap": [], "cosine": []}
        summed: list[torch.Tensor] | None = None
        for name in world.teachers:
            measured, gradients = compare(student, side(answers[name], k), len(samples))
            for key, values in (*measured.items(), ("cosine", per_sample(gradients, student[1]))):
                totals[key].append(values)
            summed = gradients if summed is None else [a + b for a, b in zip(summed, gradients, strict=True)]
        assert summed is not None
        totals["unit"] = [per_sample(summed, student[1], UNIT)]
        quartiles = {key: np.quantile(np.concatenate(values), (0.5, 0.25, 0.75)) for key, values in totals.items()}
        texts = [f"{key} {middle:.3f} ({low:.3f} to {high:.3f})" for key, (middle, low, high) in quartiles.items()]
        print(f"k {k:<3} {'   '.join(texts)}")


if __name__ == "__main__":
    main()
