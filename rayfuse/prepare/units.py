"""Units: handfuls of samples of similar length, the atoms of work.

A unit is what one prepare task makes, one teacher call scores and one student micro-step consumes. What a unit holds
depends on the data and the models alone; epochs and seeds only shuffle the order of the units.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from rayfuse.config import Config, Data
from rayfuse.data.rows import read_preferences, read_samples
from rayfuse.data.sample import DataCounts, Sample
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
    if sides:
        assert config.preferences is not None
        compared, counts = read_preferences(config.preferences, sides)
        return form_units(config, config.preferences, compared, counts)
    samples, counts = read_samples(config.data)
    return form_units(config, config.data, [(sample,) for sample in samples], counts)


def form_units(
    config: Config, data: Data, groups: Sequence[tuple[Sample, ...]], counts: DataCounts
) -> tuple[Units, DataCounts]:
    """Units of the groups that every model can read: `unit_size` groups each, which are never parted.

    Args:
        config: the models.
        data: longest sample, size of a unit, and what to do with a sample that cannot be read.
        groups: the samples, those that belong together in one group.
        counts: of the rows so far; returned with those of the samples.
    """
    sizes = measure_all(config, groups)

    limit = data.max_length
    kept: list[int] = []
    too_long = cut = 0
    unreadable: list[str] = []
    for index, of_group in enumerate(sizes):
        faults = [f"{_short(s)}: {size.fault}" for s, size in zip(groups[index], of_group, strict=True) if size.fault]
        if faults:
            unreadable += faults[:1]
        elif any(s.response >= limit or (s.total > limit and data.too_long == "drop") for s in of_group):
            too_long += 1
        else:
            kept.append(index)
            cut += any(size.total > limit for size in of_group)
    if unreadable and data.on_bad_row == "error":
        raise DataError(f"{unreadable[0]}. Correct the row, or set data.on_bad_row: skip to leave such samples out")
    if not kept:
        raise DataError(
            f"of {len(groups)} samples of {data.path} none is left: {too_long} are longer than data.max_length "
            f"{limit} (raise it, or set data.too_long: cut), {len(unreadable)} cannot be read by every model"
        )
    counts = replace(
        counts,
        samples=len(kept),
        too_long=too_long,
        cut=cut,
        unreadable=len(unreadable),
        first_unreadable=unreadable[0] if unreadable else "",
    )
    keys = ["".join(sample.key for sample in groups[index]) for index in kept]
    lengths = [min(max(size.total for size in sizes[index]), limit) for index in kept]
    units = make_units(keys, lengths, data.unit_size)
    samples = [[sample for index in unit for sample in groups[kept[index]]] for unit in units]
    longest = [max(lengths[index] for index in unit) for unit in units]
    return Units(samples, [len(of) * length for of, length in zip(samples, longest, strict=True)]), counts


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
