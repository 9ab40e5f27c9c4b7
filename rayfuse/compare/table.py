"""Raw results -> what the page shows: pandas rows per method and condition, with intervals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from rayfuse.compare.design import Plan
from rayfuse.compare.statistics import Estimate, crossed_interval, seed_interval
from rayfuse.compare.tuning import best_settings, donated, right
from rayfuse.quickstart.world import EXPERTS


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
        for name in plan.methods:
            chosen, best = donated(plan, by_cell, name), best_settings(plan, by_cell, name)
            for condition in plan.conditions:
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

    def marks(self, method: str, condition: str, skill: str = "all") -> dict[int, np.ndarray]:
        """By seed, which items are right: float64 [items] of 0 and 1."""
        rows = self.reported(method, condition)
        skills = EXPERTS if skill == "all" else (skill,)
        texts = ["".join(parts) for parts in zip(*(rows[f"right_{s}"] for s in skills), strict=True)]
        return {int(seed): np.array(list(text), dtype=np.float64) for seed, text in zip(rows.index, texts, strict=True)}

    def accuracy(self, method: str, condition: str, skill: str = "all") -> Estimate:
        """Share of right items, with its interval over seeds and items (over items where there is one seed)."""
        return crossed_interval(np.stack(list(self.marks(method, condition, skill).values())))

    def difference(self, method: str, other: str, condition: str, skill: str = "all") -> Estimate | None:
        """Accuracy of a method minus another's, paired by seed and item; None with fewer than two common seeds."""
        mine, others = self.marks(method, condition, skill), self.marks(other, condition, skill)
        seeds = sorted(mine.keys() & others.keys())
        if len(seeds) < 2:
            return None
        return crossed_interval(np.stack([mine[seed] - others[seed] for seed in seeds]))

    def bits(self, method: str, condition: str) -> Estimate:
        """Held-out bits per byte, over the seeds."""
        return seed_interval(self.reported(method, condition).bits_per_byte.to_numpy(dtype=np.float64))

    def bits_difference(self, method: str, other: str, condition: str) -> Estimate | None:
        """Bits per byte of a method minus another's, paired by seed; None with fewer than two common seeds."""
        mine, others = self.reported(method, condition).bits_per_byte, self.reported(other, condition).bits_per_byte
        seeds = mine.index.intersection(others.index)
        return seed_interval((mine[seeds] - others[seeds]).to_numpy(dtype=np.float64)) if len(seeds) > 1 else None

    def settings(self, method: str, condition: str) -> str:
        """What was chosen by tuning, as `key value` pairs; empty where nothing was."""
        rows = self.reported(method, condition)
        changes: list[dict[str, Any]] = json.loads(rows.settings.iloc[-1])
        return ", ".join(filter(None, map(_settings_text, changes)))

    def main_table(self, condition: str, part: str) -> pd.DataFrame:
        """One row per measured method of a part of the plan: accuracies, differences, bits per byte."""
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
                    **{skill: self.accuracy(name, condition, skill) for skill in (*EXPERTS, "all")},
                    "compare_to": other,
                    "difference": None if other == name else self.difference(name, other, condition),
                    "bits": self.bits(name, condition),
                    "bits_difference": None if other == name else self.bits_difference(name, other, condition),
                }
            )
        return pd.DataFrame(records)

    def tuning(self) -> list[dict[str, Any]]:
        """What every tuning cell gave on the validation items, by method."""
        by_cell = {str(row["cell"]): row for row in self.rows.to_dict("records")}
        records = []
        for name, method in self.plan.methods.items():
            chosen, best = donated(self.plan, by_cell, name), best_settings(self.plan, by_cell, name)
            if chosen is None or not method.tune:
                continue
            for settings, cell in zip(method.tune, self.plan.tuning(name, chosen), strict=True):
                row = by_cell.get(cell.name)
                if row is not None:
                    items = len(EXPERTS) * self.plan.sizes.validation
                    records.append(
                        {
                            "title": self.plan.title(name),
                            "settings": _settings_text(settings),
                            "right": right(row) / items,
                            "bits_per_byte": row["bits_per_byte"],
                            "chosen": settings == best,
                        }
                    )
        return records

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
