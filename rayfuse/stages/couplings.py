"""Gromov-Wasserstein couplings of a micro-batch, solved by many Ray tasks at once.

The one exchange of a step that needs the student's own forward pass: it sends the detached graphs [B, k, k] (a few kB)
and waits for couplings of the same size. All teachers and samples are solved at the same time, on any CPU of the
cluster, so that a step waits for the slowest handful of samples and not for their sum.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import ray
import torch

from rayfuse import cluster
from rayfuse.losses import gw_couplings

SAMPLES = 8
"""Samples of one task: at k = 10 about 50 ms of work. Smaller tasks would wait less but run in more processes at once,
and Ray keeps no more of them idle than there are CPUs: the others would be started anew at every step."""


@ray.remote
def solve(student: np.ndarray, teacher: np.ndarray) -> np.ndarray:
    """`gw_couplings` as a task."""
    return gw_couplings(student, teacher)


def begin_couplings(student: torch.Tensor, teachers: Sequence[np.ndarray]) -> Callable[[], list[torch.Tensor]]:
    """Start solving for the student's graphs against each teacher's, all [B, k, k].

    Returns:
        A function that waits, and returns the couplings [B, k, k] per teacher, on the student's device.
    """
    graphs = student.detach().double().cpu().numpy()
    task = solve.options(**cluster.coupling_task())
    starts = range(0, len(graphs), SAMPLES)
    tasks = [[task.remote(graphs[b : b + SAMPLES], of[b : b + SAMPLES]) for b in starts] for of in teachers]

    def wait() -> list[torch.Tensor]:
        return [torch.from_numpy(np.concatenate(ray.get(parts))).to(student) for parts in tasks]

    return wait
