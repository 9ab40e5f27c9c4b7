"""Units: handfuls of samples of similar length, the atoms of work.

A unit is what one prepare task makes, one teacher call scores and one student micro-step consumes. What a unit holds
depends on the data and the models alone; epochs and seeds only shuffle the order of the units.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from rayfuse.config import Config, Data
from rayfuse.data.rows import Part, compared_parser, parse_samples, read_parts
from rayfuse.data.sample import DataCounts, Sample, add_counts
from rayfuse.errors import DataError
from rayfuse.prepare.measure import measure_all

LENGTH_WINDOW = 4096
"""Samples among which units of similar length are formed: large enough for little padding, small enough to mix."""


class Units(NamedTuple):
    """A data set cut into units.

    Attributes:
        samples: those of each unit.
        sizes: student tokens of each unit, padding included: what a micro-step costs.
    """

    samples: list[list[Sample]]
    sizes: list[int]


def load_units(config: Config, sides: Sequence[str] = ()) -> tuple[Units, DataCounts]:
    """Read the data, let every model read every sample (in parallel tasks), and form the units of what is left.

    Args:
        config: the run.
        sides: where given, these responses of `preferences` are read instead of `data`; a unit then holds them for
            unit_size prompts, as chosen, rejected, chosen, rejected, ...

    Raises:
        DataError: the data cannot be read; a model cannot read a sample and `on_bad_row` is "error"; nothing is left.
    """
    data = config.preferences if sides else config.data
    assert data is not None  # the configuration is refused otherwise
    parts: Sequence[Part[Any]]
    parts = read_parts(data, None, compared_parser(sides)) if sides else read_parts(data, None, parse_samples)
    groups = [item if sides else (item,) for part in parts for item in part.items]
    weights = [(number, part.source.weight) for number, part in enumerate(parts) for _ in part.items]
    counts = add_counts([part.counts for part in parts])
    return form_units(config, data, groups, counts, weights if data.weighted else None)


def form_units(
    config: Config,
    data: Data,
    groups: Sequence[tuple[Sample, ...]],
    counts: DataCounts,
    weights: Sequence[tuple[int, float]] | None = None,
) -> tuple[Units, DataCounts]:
    """Units of the groups that every model can read: `unit_size` groups each, which are never parted.

    Args:
        config: the models, and the seed by which weights draw.
        data: longest sample, size of a unit, and what to do with a sample that cannot be read.
        groups: the samples, those that belong together in one group.
        counts: of the rows so far; returned with those of the samples.
        weights: the data set of each group, by number, and its weight: see `draw`; default: all are there once.
    """
    sizes = measure_all(config, groups)
    kept: list[int] = []
    too_long_for: Counter[str] = Counter()
    unreadable: list[str] = []
    for index, group_sizes in enumerate(sizes):
        # Length before faults: what is left out for its length is never read.
        too_long = next(filter(None, (size.too_long_for(data) for size in group_sizes)), "")
        faults = [f"{_short(s)}: {z.fault}" for s, z in zip(groups[index], group_sizes, strict=True) if z.fault]
        if too_long:
            too_long_for[too_long] += 1
        elif faults:
            unreadable += faults[:1]
        else:
            kept.append(index)
    if unreadable and data.on_bad_row == "error":
        raise DataError(f"{unreadable[0]}. Correct the row, or set data.on_bad_row: skip to leave such samples out")
    counts = replace(
        counts,
        samples=len(kept),
        too_long=too_long_for.total(),
        too_long_for=dict(too_long_for),
        cut=sum(any(size.is_cut(data) for size in sizes[index]) for index in kept),
        unreadable=len(unreadable),
        first_unreadable=unreadable[0] if unreadable else "",
    )
    if not kept:
        raise DataError(f"of {len(groups)} samples of {data.label} none is left: {_why_none(counts, data)}")
    keys = ["".join(sample.key for sample in groups[index]) for index in kept]
    lengths = [min(max(size.total for size in sizes[index]), data.max_length) for index in kept]
    units: list[list[int]] = []
    for drawn in draw(keys, None if weights is None else [weights[index] for index in kept], config.seed):
        formed = make_units([keys[i] for i in drawn], [lengths[i] for i in drawn], data.unit_size)
        units += [[drawn[place] for place in unit] for unit in formed]
    samples = [[sample for index in unit for sample in groups[kept[index]]] for unit in units]
    longest = [max(lengths[index] for index in unit) for unit in units]
    counts = replace(counts, drawn=sum(map(len, units)))
    return Units(samples, [len(unit) * length for unit, length in zip(samples, longest, strict=True)]), counts


def _why_none(counts: DataCounts, data: Data) -> str:
    long = ", ".join(f"{count} for {model}" for model, count in counts.too_long_for.items()) or "none"
    return (
        f"too long: {long} (data.max_length is {data.max_length} student tokens, a teacher reads its context; raise "
        f"it, or set data.too_long: cut); {counts.unreadable} cannot be read by every model"
    )


def draw(keys: Sequence[str], weights: Sequence[tuple[int, float]] | None, seed: int) -> list[list[int]]:
    """The rounds of an epoch: lists of indices into `keys`, in each of which an index is at most once.

    The groups of a data set of weight w are in floor(w) rounds. The share w - floor(w) of them (rounded to a whole
    number, and at least one group of every data set) is in one more: those whose hash of seed and key is smallest.

    Args:
        keys: of the groups.
        weights: the data set of each group, by number, and its weight; where there are none, there is one round of all.
        seed: of the drawing.
    """
    if weights is None:
        return [list(range(len(keys)))]
    members: dict[tuple[int, float], list[int]] = {}
    for index, weighted in enumerate(weights):
        members.setdefault(weighted, []).append(index)
    times = [math.floor(weight) for _, weight in weights]
    for (_, weight), indices in members.items():
        share = round((weight - math.floor(weight)) * len(indices))
        lots = sorted(indices, key=lambda index: (hashlib.sha256(f"{seed}/{keys[index]}".encode()).digest(), index))
        for index in lots[: max(share, int(weight < 1))]:
            times[index] += 1
    return [[index for index, count in enumerate(times) if count > turn] for turn in range(max(times))]


def _short(sample: Sample) -> str:
    return f"sample {sample.key[:12]} ({sample.response!r:.60})"


def make_units(keys: Sequence[str], lengths: Sequence[int], unit_size: int) -> list[list[int]]:
    """Cut samples into units of `unit_size` (the last may be smaller): lists of indices into `keys`.

    Samples stand in the order of their keys, are sorted by length inside windows of LENGTH_WINDOW, and cut.
    So a unit pads little, and which samples share a unit depends on nothing but the data.
    """
    order = sorted(range(len(keys)), key=lambda i: (keys[i], i))
    units: list[list[int]] = []
    for start in range(0, len(order), LENGTH_WINDOW):
        window = sorted(order[start : start + LENGTH_WINDOW], key=lambda i: (lengths[i], keys[i], i))
        units += [window[i : i + unit_size] for i in range(0, len(window), unit_size)]
    return units


def unit_order(units: int, total: int, seed: int) -> list[int]:
    """The units of `total` micro-steps: whole epochs, each shuffled by seed and epoch, cut at `total`."""
    order: list[int] = []
    for epoch in range(-(-total // units)):
        shuffled = list(range(units))
        random.Random(f"{seed}/{epoch}").shuffle(shuffled)
        order += shuffled
    return order[:total]


def share_out(units: Sequence[int], sizes: Sequence[int], workers: int) -> list[list[int]]:
    """The units of one step for each worker: equally many, and as equal in size as a greedy rule makes them.

    The largest unit first, each to the worker with the least so far that has room. The workers meet at the end of every
    step, so the one with the most to do is waited for. A worker keeps its units in the order of `units`.

    Args:
        units: of the step; `workers` divides their number.
        sizes: by unit.
    """
    room = len(units) // workers
    shares: list[list[int]] = [[] for _ in range(workers)]
    load = [0] * workers
    for place in sorted(range(len(units)), key=lambda place: -sizes[units[place]]):
        least = min((worker for worker in range(workers) if len(shares[worker]) < room), key=load.__getitem__)
        shares[least].append(place)
        load[least] += sizes[units[place]]
    return [[units[place] for place in sorted(share)] for share in shares]
