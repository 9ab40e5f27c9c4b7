"""The data of the Phi-4 run: 52k rows of Infinity-Instruct, 39k of NuminaMath-1.5, 39k of KodCode.

    python jobs/phi4/prepare_data.py /shared/phi4 [--share 0.01] [--infinity FILE --numina FILE --kodcode FILE]

Writes train.jsonl (`messages`, `skill`) and prompts.jsonl (every second row without its answer, for the preferences).
The data sets are streamed: only as much is downloaded as is read. A FILE of JSON lines in the data set's own columns
takes its place. KodCode's licence (CC BY-NC 4.0) allows no commercial use. The papers do not say which rows they took:
these are drawn from the streams by a seed, one for each prompt.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from rayfuse.files import write_whole

Messages = list[dict[str, str]]
ROLES = {"human": "user", "gpt": "assistant", "system": "system"}
BUFFER = 10_000
"""Rows of a stream among which the next one is drawn."""


def infinity(row: Mapping[str, Any]) -> Messages | None:
    """A conversation that ends with an answer."""
    turns = [{"role": ROLES.get(turn["from"], ""), "content": turn["value"].strip()} for turn in row["conversations"]]
    whole = all(turn["role"] and turn["content"] for turn in turns)
    return turns if whole and turns and turns[-1]["role"] == "assistant" else None


def numina(row: Mapping[str, Any]) -> Messages | None:
    """A problem and its solution, where both are marked valid."""
    valid = row.get("problem_is_valid", "Yes") == "Yes" and row.get("solution_is_valid", "Yes") == "Yes"
    return _pair(row["problem"], row["solution"]) if valid else None


def kodcode(row: Mapping[str, Any]) -> Messages | None:
    """A question and its verified solution, as a block of Python."""
    return _pair(row["question"], f"```python\n{row['solution'].strip()}\n```") if row.get("solution") else None


def _pair(prompt: str | None, response: str | None) -> Messages | None:
    if not prompt or not response or not prompt.strip() or not response.strip():
        return None
    return [{"role": "user", "content": prompt.strip()}, {"role": "assistant", "content": response.strip()}]


class Part(NamedTuple):
    """A data set of the run: id and configuration on the hub, rows wanted, what its rows become, and their skill."""

    path: str
    name: str | None
    rows: int
    read: Callable[[Mapping[str, Any]], Messages | None]
    skill: str


PARTS = {
    "infinity": Part("BAAI/Infinity-Instruct", "0625", 52_000, infinity, "general"),
    "numina": Part("AI-MO/NuminaMath-1.5", None, 39_000, numina, "math"),
    "kodcode": Part("KodCode/KodCode-V1", None, 39_000, kodcode, "code"),
}


def stream(part: Part, file: str | None, seed: int) -> Iterator[Mapping[str, Any]]:
    """The rows of a part, in an order drawn by the seed."""
    from datasets import load_dataset

    if file is None:
        rows = load_dataset(part.path, part.name, split="train", streaming=True)
    else:
        rows = load_dataset("json", data_files=file, split="train", streaming=True)
    yield from rows.shuffle(seed=seed, buffer_size=BUFFER)


def take(part: Part, rows: Iterator[Mapping[str, Any]], wanted: int, seen: set[str]) -> list[dict[str, Any]]:
    """The first `wanted` usable rows whose prompt is in none of `seen`, which grows."""
    taken: list[dict[str, Any]] = []
    for row in rows:
        messages = part.read(row)
        prompt = json.dumps(messages[:-1]) if messages else ""
        if messages and prompt not in seen:
            seen.add(prompt)
            taken.append({"messages": messages, "skill": part.skill})
        if len(taken) == wanted:
            break
    return taken


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the files go")
    parser.add_argument("--share", type=float, default=1.0, help="of the rows: 0.01 is a trial of 1,300")
    parser.add_argument("--seed", type=int, default=0, help="of the drawing")
    for name, part in PARTS.items():
        parser.add_argument(f"--{name}", metavar="FILE", help=f"JSON lines in place of {part.path}")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    seen: set[str] = set()
    rows: list[dict[str, Any]] = []
    for name, part in PARTS.items():
        wanted = max(1, round(part.rows * arguments.share))
        found = take(part, stream(part, getattr(arguments, name), arguments.seed), wanted, seen)
        print(f"{name}: {len(found):,} of {wanted:,} rows")
        if len(found) < wanted:
            sys.exit(f"{name} has too few usable rows for {wanted:,}: lower --share")
        rows += found
    prompts = [{"messages": row["messages"][:-1], "skill": row["skill"]} for row in rows[::2]]
    for name, lines in (("train", rows), ("prompts", prompts)):
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        write_whole(arguments.folder / f"{name}.jsonl", text)


if __name__ == "__main__":
    main()
