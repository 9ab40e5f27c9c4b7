"""Clusters of prompts: fields that a source knows or does not know, given by the data or found by spherical k-means.

Found ones compare the prompts' bytes: counts of byte 3-grams, hashed to DIMENSIONS, under a logarithm, weighted by how
rare they are, of length 1 (so that the dot product is a cosine). Deterministic: centres start from a seeded k-means++
over the prompts in the order of their texts, so neither the data's order nor the run changes what is found.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

DIMENSIONS = 2048
SAMPLE = 10_000
"""Centres are found on at most so many prompts; all are then assigned."""
PER_CLUSTER = 50
"""Prompts per cluster, at least, on average: fewer tell too little of a source."""
MOST = 12
ROUNDS = 25
STARTS = 4


@dataclass(frozen=True)
class Clusters:
    """Prompts in fields.

    Attributes:
        of_prompt: cluster of each prompt, from 0.
        names: of each cluster: the data's field, or "group 1", "group 2", ...
        given: whether the data name the fields.
    """

    of_prompt: np.ndarray
    names: tuple[str, ...]
    given: bool


def clusters_of(texts: Sequence[str], fields: Sequence[str], most: int = MOST) -> Clusters:
    """The fields that the data name, where they name one for every prompt and more than one; else found ones.

    Args:
        texts: the prompts.
        fields: of each prompt, "" where the data name none.
        most: clusters to find at most; fewer where there are fewer than PER_CLUSTER prompts to each.
    """
    names = tuple(sorted(set(fields)))
    if len(names) > 1 and "" not in names:
        number = {name: index for index, name in enumerate(names)}
        return Clusters(np.array([number[field] for field in fields]), names, True)
    found = k_means(texts, min(most, max(1, len(texts) // PER_CLUSTER)))
    return Clusters(found, tuple(f"group {index + 1}" for index in range(int(found.max(initial=0)) + 1)), False)


def k_means(texts: Sequence[str], clusters: int, seed: int = 0) -> np.ndarray:
    """Cluster of each text [P]; clusters are numbered by their size, the largest first, and none is empty."""
    if clusters < 2 or len(set(texts)) < 2:
        return np.zeros(len(texts), dtype=np.int64)
    order = np.array(sorted(range(len(texts)), key=lambda index: texts[index]))
    draw = np.random.default_rng(seed)
    picked = order if len(order) <= SAMPLE else order[np.sort(draw.choice(len(order), SAMPLE, replace=False))]
    counts_ND = _counts([texts[index] for index in picked])
    rarity_D = np.log((1 + len(picked)) / (1 + (counts_ND > 0).sum(0)))
    vectors_ND = _unit(counts_ND * rarity_D)
    best_score, centres_KD = -np.inf, vectors_ND[:1]
    for _ in range(STARTS):
        found_KD, score = _search(vectors_ND, clusters, draw)
        if score > best_score:
            best_score, centres_KD = score, found_KD
    assigned = np.empty(len(texts), dtype=np.int64)
    for start in range(0, len(order), SAMPLE):
        part = order[start : start + SAMPLE]
        assigned[part] = (_unit(_counts([texts[i] for i in part]) * rarity_D) @ centres_KD.T).argmax(1)
    size = np.bincount(assigned, minlength=len(centres_KD))
    by_size = np.argsort(-size, kind="stable")
    rank = np.empty_like(by_size)
    rank[by_size] = np.arange(len(by_size))
    return rank[assigned]


def _counts(texts: Sequence[str]) -> np.ndarray:
    """log(1 + count) of each hashed byte 3-gram, [N, DIMENSIONS] float32."""
    counts = np.zeros((len(texts), DIMENSIONS), dtype=np.float32)
    for row, text in enumerate(texts):
        data = np.frombuffer(f" {text.lower()} ".encode("utf-8", "surrogatepass"), dtype=np.uint8).astype(np.uint64)
        grams = (data[:-2] << np.uint64(16)) | (data[1:-1] << np.uint64(8)) | data[2:]
        mixed = (grams * np.uint64(2_654_435_761)) & np.uint64(0xFFFFFFFF)
        counts[row] = np.bincount((mixed >> np.uint64(21)).astype(np.int64), minlength=DIMENSIONS)
    return np.log1p(counts)


def _unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)


def _search(vectors_ND: np.ndarray, clusters: int, draw: np.random.Generator) -> tuple[np.ndarray, float]:
    """Centres [K, D] from one start, and the sum of cosines to the nearest."""
    centres = [vectors_ND[draw.integers(len(vectors_ND))]]
    nearest = vectors_ND @ centres[0]
    for _ in range(clusters - 1):
        distance = np.maximum(1 - nearest, 0) ** 2
        if distance.sum() < 1e-9:
            break
        centres.append(vectors_ND[draw.choice(len(vectors_ND), p=distance / distance.sum())])
        nearest = np.maximum(nearest, vectors_ND @ centres[-1])
    centres_KD, score = np.stack(centres), -np.inf
    for _ in range(ROUNDS):
        cosines = vectors_ND @ centres_KD.T
        assigned, before, score = cosines.argmax(1), score, float(cosines.max(1).sum())
        used = np.unique(assigned)
        centres_KD = _unit(np.stack([vectors_ND[assigned == cluster].sum(0) for cluster in used]))
        if score - before < 1e-4:
            break
    return centres_KD, score
