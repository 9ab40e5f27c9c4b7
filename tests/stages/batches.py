"""One small micro-batch for any method: two teachers, all that prepare tasks can put into it, drawn by a seed."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch

from rayfuse.batch import FusionBatch, RolloutTarget, TeacherTarget
from rayfuse.config import STAGES, InfiGFusion, Stage
from rayfuse.losses import HeadOutput, fused_head, token_logps
from rayfuse.prepare.targets import graph_features, graph_matrices

H, V, K = 12, 40, 6
LENGTHS = (5, 8, 4, 7, 6, 3)
TEACHERS = ("t0", "t1")


@dataclass(frozen=True)
class Case:
    """A micro-batch, and the student's hidden states and output weight, from which its answer follows."""

    hidden: torch.Tensor
    weight: torch.Tensor
    batch: FusionBatch

    def output(self, *, preferences: bool) -> HeadOutput | torch.Tensor:
        """What the student says about it: its fused head's output, or log-probabilities [N] of the labels."""
        labels = torch.from_numpy(self.batch.labels)
        if preferences:
            return token_logps(self.hidden, self.weight, labels)
        picks = None if self.batch.picks is None else torch.from_numpy(self.batch.picks)
        return fused_head(self.hidden, self.weight, labels, K, picks=picks, lse_gradient=True)


def every_stage() -> dict[str, Stage]:
    """Each method with its defaults, but for `lam`, which is one half wherever there is one."""
    return {name: kind(method=name) for name, kind in STAGES.items()} | {
        name: kind(method=name, lam=0.5) for name, kind in STAGES.items() if "lam" in kind.model_fields
    }


def make_case(stage: Stage, kinds: tuple[str, ...], seed: int = 0) -> Case:
    """A batch that carries these kinds of targets."""
    make = torch.Generator().manual_seed(seed)
    sample = np.repeat(np.arange(len(LENGTHS)), LENGTHS)
    N = len(sample)
    hidden = torch.randn(N, H, generator=make, requires_grad=True)
    weight = torch.randn(V, H, generator=make, requires_grad=True)
    labels = torch.randint(0, V, (N,), generator=make).numpy()
    second = 1.0 if stage.kept(K) is None else 0.5
    targets = [_teacher(stage, name, weight, N, make) for name, weight in zip(TEACHERS, (1.0, second), strict=True)]
    none = np.zeros(0, dtype=np.int64)
    picks, mass = None, None
    if {"carried", "mined"} & set(kinds):
        picks = np.stack([np.concatenate(([label], (label + 1 + np.arange(3)) % V)) for label in labels])
        mass = torch.rand(N, 4, generator=make).softmax(-1).numpy()
    elif "tokens" in kinds:
        picks = np.repeat(labels[:, None], 2 * K, axis=1)
        for s, target in enumerate(targets):
            assert target.ids is not None
            columns = np.arange(s * K, (s + 1) * K)
            picks[target.rows[:, None], columns] = np.where(target.ids < 0, labels[target.rows, None], target.ids)
    rollouts = None
    if "routed" in kinds:
        picks, rollouts = _rollouts(labels, sample, make)
        heavy = sample % 3  # of every three samples two are the student's own, one of each teacher
        rows = [np.flatnonzero(heavy == s) for s in range(2)]
        targets = [replace(target, rows=of_teacher) for target, of_teacher in zip(targets, rows, strict=True)]
    if stage.sides:
        targets.append(_teacher(stage, "initial", 1.0, N, make))
    ids = np.zeros((len(LENGTHS), 1), dtype=np.int64)
    masks = np.ones_like(ids)
    batch = FusionBatch(ids, masks, none, labels, sample, tuple(targets), picks, mass, rollouts=rollouts)
    return Case(hidden, weight, batch)


def _rollouts(labels: np.ndarray, sample: np.ndarray, make: torch.Generator) -> tuple[np.ndarray, RolloutTarget]:
    """Four cells: the label's, two of other tokens, one of them of two; the last pick is unused. A third of the own
    positions has no distribution, in chunks of two."""
    N = len(labels)
    picks = np.stack([np.concatenate(([label], (label + 1 + np.arange(3)) % V, [label])) for label in labels])
    own = sample % 3 < 2
    taught = own & (np.arange(N) % 3 > 0)
    mass = torch.rand(N, 5, generator=make).softmax(-1).numpy()
    mass[:, 3:] = 0
    chunk_logps = -3 * torch.rand(N, generator=make).numpy()
    return picks, RolloutTarget(
        own=own,
        taught=taught,
        cells=np.tile([0, 1, 2, 2, -1], (N, 1)),
        mass=mass,
        chunks=np.where(own, np.arange(N) // 2, -1),
        chunk_logps=chunk_logps[np.arange(N) // 2],
        counts=np.where(sample == 0, 0.5, 1.0).astype(np.float32),
    )


def _teacher(stage: Stage, name: str, weight: float, N: int, make: torch.Generator) -> TeacherTarget:
    rows = torch.randperm(N, generator=make)[: N - 9].sort().values.numpy()
    logps, tokens = (torch.randn(len(rows), 3 * V, generator=make) * 2).log_softmax(-1).topk(K)
    ids = torch.stack([torch.randperm(V, generator=make)[:K] for _ in rows])
    ids[torch.rand(ids.shape, generator=make) < 0.4] = -1
    unmatched = np.packbits((torch.rand(V, generator=make) < 0.4).numpy())
    whole = [torch.randn(length, 3 * V, generator=make).log_softmax(-1).topk(K).values.numpy() for length in LENGTHS]
    graph = graph_matrices if isinstance(stage, InfiGFusion) and stage.mode == "exact" else graph_features
    response_tokens = np.array(LENGTHS, dtype=np.float32)
    return TeacherTarget(
        name,
        weight,
        rows,
        logps.half().numpy(),
        graph=graph(whole),
        response_logps=-torch.rand(len(LENGTHS), generator=make).mul(3).numpy() * response_tokens,
        response_tokens=response_tokens,
        ids=ids.numpy(),
        teacher_ids=tokens.numpy(),
        unmatched=unmatched,
        overlap=0.6,
    )
