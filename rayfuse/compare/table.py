"""Raw results -> what the page shows: pandas rows per method and condition, with intervals."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from rayfuse.compare.design import Plan
from rayfuse.compare.statistics import Estimate, crossed_interval
from rayfuse.compare.tuning import best_settings, donated, score
from rayfuse.quickstart.facts import FIELDS


class RawResults:
    """The Parquet of raw results, one row per cell.

    Attributes:
        plan: what was compared.
        rows: all rows.
        cells: names of the reported cells, by method and condition; none where tuning is not done.
    """

    def __init__(self, plan: Plan, path: Path) -> None:
        self.plan = plan
        self.rows = pd.read_parquet(path)
        by_cell = {str(row["cell"]): row for row in self.rows.to_dict("records")}
        self.cells: dict[tuple[str, str], list[str]] = {}
        for name, condition in product(plan.methods, plan.conditions):
            world = plan.conditions[condition].world
            chosen, best = donated(plan, by_cell, name, world), best_settings(plan, by_cell, name, world)
            known = chosen is not None and best is not None and condition in plan.conditions_of(name)
            cells = plan.reported(name, condition, {**(chosen or {}), name: best or {}}) if known else ()
            self.cells[name, condition] = [cell.name for cell in cells]

    def reported(self, method: str, condition: str) -> pd.DataFrame:
        """The reported rows of a method in a condition, by seed, with the settings that tuning chose.

        A model that is not trained has the same row for every seed.
        """
        rows = self.rows
        mine = rows[rows.cell.isin(self.cells[method, condition])].set_index("seed").sort_index()
        if self.plan.methods[method].model and not mine.empty:
            return mine.iloc[[0] * len(self.plan.seeds)].set_axis(self.plan.seeds)
        return mine

    def marks(self, method: str, condition: str, field: str = "all") -> dict[int, np.ndarray]:
        """By seed, which items are right: float64 [items] of 0 and 1."""
        rows = self.reported(method, condition)
        fields = FIELDS if field == "all" else (field,)
        texts = ["".join(parts) for parts in zip(*(rows[f"right_{one}"] for one in fields), strict=True)]
        return {int(seed): np.array(list(text), dtype=np.float64) for seed, text in zip(rows.index, texts, strict=True)}

    def accuracy(self, method: str, condition: str, field: str = "all") -> Estimate:
        """Share of right items, with its interval over seeds and items (over items where there is one seed)."""
        return crossed_interval(np.stack(list(self.marks(method, condition, field).values())))

    def difference(self, method: str, other: str, condition: str, field: str = "all") -> Estimate | None:
        """Accuracy of a method minus another's, paired by seed and item; None with fewer than two common seeds."""
        mine, others = self.marks(method, condition, field), self.marks(other, condition, field)
        seeds = sorted(mine.keys() & others.keys())
        if len(seeds) < 2:
            return None
        return crossed_interval(np.stack([mine[seed] - others[seed] for seed in seeds]))

    def headroom(self, method: str, condition: str, field: str = "all") -> float | None:
        """Share of the way from the pivot to the student of right labels on every prompt (`oracle`) that a method goes:
        0 at the pivot, 1 at the oracle; None where one of them is not measured, or there is no way to go."""
        ends = [self._in_world(name, condition) for name in ("pivot", "oracle")]
        if None in ends or self.reported(method, condition).empty:
            return None
        low, high = (
            self.accuracy(name, str(where), field).mean for name, where in zip(("pivot", "oracle"), ends, strict=True)
        )
        return (self.accuracy(method, condition, field).mean - low) / (high - low) if high > low else None

    def _in_world(self, method: str, condition: str) -> str | None:
        """This condition, or another of its world in which a method is reported: what learns from no label needs only
        one."""
        if method not in self.plan.methods:
            return None
        world = self.plan.conditions[condition].world
        others = (name for name, one in self.plan.conditions.items() if one.world == world)
        return next((name for name in (condition, *others) if not self.reported(method, name).empty), None)

    def settings(self, method: str, condition: str) -> str:
        """What was chosen by tuning, as `key value` pairs; empty where nothing was."""
        rows = self.reported(method, condition)
        changes: list[dict[str, Any]] = json.loads(rows.settings.iloc[-1])
        return ", ".join(filter(None, map(_settings_text, changes)))

    def main_table(self, condition: str, part: str) -> pd.DataFrame:
        """One row per measured method of a part of the plan: accuracies, differences, share of the head-room."""
        records = []
        for name, method in self.plan.methods.items():
            if method.part != part or self.reported(name, condition).empty:
                continue
            other = method.compare_to
            records.append(
                {
                    "method": name,
                    "title": method.title or name,
                    "settings": self.settings(name, condition),
                    "seeds": len(self.reported(name, condition)),
                    **{field: self.accuracy(name, condition, field) for field in (*FIELDS, "all")},
                    "compare_to": other,
                    "difference": None if other == name else self.difference(name, other, condition),
                    "headroom": self.headroom(name, condition),
                }
            )
        return pd.DataFrame(records)

    def tuning(self) -> list[dict[str, Any]]:
        """What every setting tried gave on the validation items of the tuning seeds, by world and method.

        `edge` tells that the chosen one is the smallest or largest value tried of its only key: a better one may lie
        beyond.
        """
        by_cell = {str(row["cell"]): row for row in self.rows.to_dict("records")}
        records = []
        for name, method in self.plan.methods.items():
            for world in self.plan.worlds_of(name) if method.tune else ():
                chosen = donated(self.plan, by_cell, name, world)
                best = best_settings(self.plan, by_cell, name, world)
                for settings, cells in zip(method.tune, self.plan.tuning(name, world, chosen or {}), strict=True):
                    measured = [cell for cell in cells if chosen is not None and cell.name in by_cell]
                    if not measured:
                        continue
                    right, bits = score(by_cell, measured)
                    records.append(
                        {
                            "title": self.plan.title(name),
                            "world": self.plan.worlds[world].title,
                            "settings": _settings_text(settings),
                            "right": right / (len(FIELDS) * self.plan.sizes.validation * len(measured)),
                            "bits_per_byte": -bits / len(measured),
                            "chosen": settings == best,
                            "edge": settings == best and _at_the_edge(settings, method.tune),
                        }
                    )
        return records

    def gradients(self) -> pd.DataFrame:
        """At the pivot, by method and world: `gradient_ratio` and `gradient_cosine` of its distance beside SFT on right
        answers."""
        by_cell = {str(row["cell"]): row for row in self.rows.to_dict("records")}
        records = [
            {
                "title": self.plan.title(name),
                "world": self.plan.worlds[self.plan.conditions[cell.condition].world].title,
                **{key: by_cell[cell.name][key] for key in ("gradient_ratio", "gradient_cosine")},
            }
            for name in self.plan.methods
            for cell in self.plan.gradients(name)
            if cell.name in by_cell
        ]
        return pd.DataFrame(records)

    def missing(self) -> list[str]:
        """The methods of the plan that are not measured in all their conditions with all their seeds, by title."""
        missing = []
        for name, method in self.plan.methods.items():
            wanted = 1 if method.model else len(method.seeds or self.plan.seeds)
            short = [
                self.plan.conditions[condition].title
                for condition in self.plan.conditions_of(name)
                if len(self.reported(name, condition)) < wanted
            ]
            if short:
                everywhere = len(short) == len(self.plan.conditions_of(name))
                missing.append(self.plan.title(name) + ("" if everywhere else f" ({', '.join(short)})"))
        return missing

    def costs(self) -> pd.DataFrame:
        """What a training of each method takes: one row per trained method that is reported.

        Processor time and memory are medians over all reported trainings, answers those of the one that had to ask for
        least a second time; what needs an empty store (`forwards_per_text`, `bytes_per_token`) is that of the
        measurement of cost, NaN where there is none.
        """
        measured = self.rows[self.rows.purpose == "cost"].drop_duplicates("method", keep="last").set_index("method")
        records = []
        for name, method in self.plan.methods.items():
            rows = pd.concat([self.reported(name, condition) for condition in self.plan.conditions])
            if rows.empty or not method.stages or method.part == "ablation":
                continue
            trained = rows[rows.steps > 0]  # other merges of the same students find them trained
            record = {
                "title": self.plan.title(name),
                "cpu_per_step": (trained.train_cpu_seconds / trained.steps).median(),
                "peak_mib": trained.peak_mib.median(),
                "answers_per_text": (trained.answers_used / (trained.steps * self.plan.sizes.batch_size)).min(),
            }
            if name in measured.index and measured.loc[name].texts:
                cost = measured.loc[name]
                record |= {
                    "forwards_per_text": cost.forwarded / cost.texts,
                    "bytes_per_token": cost.signal_bytes / cost.signal_rows if cost.signal_rows else 0.0,
                }
            records.append(record)
        columns = ["title", "cpu_per_step", "peak_mib", "answers_per_text", "forwards_per_text", "bytes_per_token"]
        return pd.DataFrame(records, columns=columns)


def _settings_text(settings: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value:g}" for key, value in settings.items())


def _at_the_edge(settings: dict[str, Any], tried: Sequence[dict[str, Any]]) -> bool:
    """Whether settings of one key have its smallest or largest value of three or more."""
    keys = {key for one in tried for key in one}
    if len(keys) != 1 or len(tried) < 3:
        return False
    (key,) = keys
    values = [one[key] for one in tried]
    return settings[key] in (min(values), max(values))
