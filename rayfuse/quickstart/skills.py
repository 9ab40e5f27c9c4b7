"""Small tasks in three skills whose answers can be checked by exact match.

Each kind of task draws a prompt, its right response and a plausibly wrong one from a seeded generator: a number that is
off, two list elements exchanged, a word too many. Prompts belong to the training or to the held-out split by their own
hash, so that no seed can put a held-out prompt into a training set.
"""

import hashlib
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from random import Random
from typing import Any, Literal, NamedTuple

from rayfuse.errors import DataError
from rayfuse.files import write_whole

Split = Literal["train", "heldout"]

# fmt: off
WORDS = [
    "red", "blue", "green", "black", "white", "pink", "cat", "dog", "fox", "hen", "cow", "pig", "sun", "moon", "star",
    "rain", "snow", "wind", "tree", "leaf", "rose", "seed", "corn", "rice", "milk", "salt", "cup", "pan", "lamp",
    "desk", "door", "roof", "boat", "ship", "road", "bell",
]
# fmt: on

HELDOUT_SHARE = 0.2


class Task(NamedTuple):
    """One drawn task; `wrong` differs from `right`."""

    prompt: str
    right: str
    wrong: str


def make(skill: str, n: int, seed: int, wrong_share: float = 0.0, split: Split = "train") -> list[dict[str, Any]]:
    """Draw `n` rows {"prompt", "response", "skill", "correct"} of one skill, in the order drawn.

    The prompts depend on `skill`, `n`, `seed` and `split` only: exactly `round(n * wrong_share)` of the rows then carry
    the wrong response, and "correct" is false there. A prompt may be drawn more than once.

    Raises DataError for a skill that does not exist, or a share outside [0, 1].
    """
    if skill not in SKILLS:
        raise DataError(f"there is no skill {skill!r}: choose one of {', '.join(SKILLS)}")
    if not 0.0 <= wrong_share <= 1.0:
        raise DataError(f"wrong_share is a share of the rows, between 0 and 1, not {wrong_share}")
    draw = Random(f"{skill}/{split}/{seed}")
    wrong_rows = set(Random(f"wrong/{skill}/{seed}").sample(range(n), round(n * wrong_share)))
    kinds = SKILLS[skill]
    rows: list[dict[str, Any]] = []
    while len(rows) < n:
        task = draw.choice(kinds)(draw)
        if split_of(task.prompt) == split:
            wrong = len(rows) in wrong_rows
            response = task.wrong if wrong else task.right
            rows.append({"prompt": task.prompt, "response": response, "skill": skill, "correct": not wrong})
    return rows


def split_of(prompt: str) -> Split:
    """The split that a prompt belongs to: decided by its own bytes alone."""
    first_bytes = int.from_bytes(hashlib.sha256(prompt.encode()).digest()[:4], "big")
    return "heldout" if first_bytes < HELDOUT_SHARE * 2**32 else "train"


def write_rows(rows: Iterable[dict[str, Any]], path: Path) -> None:
    """Write rows as JSON lines."""
    write_whole(path, "".join(json.dumps(row) + "\n" for row in rows))


# ---- math: running sums and differences, comparisons ----


def _commas(values: Iterable[object]) -> str:
    return ", ".join(str(value) for value in values)


def _off(draw: Random, value: int) -> int:
    """A number near `value`, not equal to it and not negative."""
    steps = [step for step in (-10, -2, -1, 1, 2, 10) if value + step >= 0]
    return value + draw.choice(steps)


def _running(draw: Random, start: int, changes: list[int]) -> tuple[list[int], list[int]]:
    """The value after each change, and the same with one mistake that the later values carry on."""
    mistake = draw.randrange(len(changes))
    value, right = start, []
    for change in changes:
        value += change
        right.append(value)
    error = _off(draw, right[mistake]) - right[mistake]
    wrong = [value + (error if i >= mistake else 0) for i, value in enumerate(right)]
    return right, wrong


def _sums(draw: Random) -> Task:
    first, *others = [draw.randint(1, 9) for _ in range(4)]
    right, wrong = _running(draw, first, others)
    return Task(f"Sums of {_commas([first, *others])}", _commas(right), _commas(wrong))


def _differences(draw: Random) -> Task:
    start, changes = draw.randint(28, 60), [draw.randint(1, 9) for _ in range(3)]
    right, wrong = _running(draw, start, [-change for change in changes])
    return Task(f"From {start} take {_commas(changes)}", _commas(right), _commas(wrong))


def _largest(draw: Random) -> Task:
    values = draw.sample(range(10, 100), 4)
    right, *others = sorted(values, reverse=True)
    return Task(f"Largest of {_commas(values)}", str(right), str(draw.choice(others)))


def _above(draw: Random) -> Task:
    limit, *values = draw.sample(range(10, 100), 4)
    right = [value for value in values if value > limit]
    picked = draw.choice(values)
    wrong = [value for value in values if (value > limit) != (value == picked)]
    return Task(f"Above {limit}: {_commas(values)}", _commas(right) or "none", _commas(wrong) or "none")


# ---- code: what an expression on a list gives ----


def _exchanged(draw: Random, values: list[int]) -> list[int]:
    """`values` with two elements exchanged; all elements are distinct."""
    i, j = draw.sample(range(len(values)), 2)
    result = list(values)
    result[i], result[j] = result[j], result[i]
    return result


def _reverse(draw: Random) -> Task:
    values = draw.sample(range(10), draw.randint(4, 5))
    right = values[::-1]
    return Task(f"{values}[::-1]", f"{right}", f"{_exchanged(draw, right)}")


def _sort(draw: Random) -> Task:
    values = draw.sample(range(10), draw.randint(4, 5))
    right = sorted(values)
    return Task(f"sorted({values})", f"{right}", f"{_exchanged(draw, right)}")


def _range(draw: Random) -> Task:
    start, step, count = draw.randint(0, 20), draw.randint(2, 5), draw.randint(3, 5)
    stop = start + step * (count - 1) + draw.randint(1, step)
    right = list(range(start, stop, step))
    wrong = draw.choice([right[:-1], [*right, right[-1] + step], [*right[:-1], _off(draw, right[-1])]])
    return Task(f"list(range({start}, {stop}, {step}))", f"{right}", f"{wrong}")


def _join(draw: Random) -> Task:
    words = draw.sample(WORDS, draw.randint(3, 4))
    mark, other = draw.sample(["-", "+", "/", "_"], 2)
    wrong = draw.choice([other.join(words), mark.join(words[:-1]), mark.join(words[1:] + words[:1])])
    return Task(f'"{mark}".join({json.dumps(words)})', mark.join(words), wrong)


# ---- instruct: doing with words what is asked ----


def _repeat(draw: Random) -> Task:
    first, second = draw.sample(WORDS, 2)
    times, other_times = draw.sample(range(2, 6), 2)
    right = " ".join([first] * times + [second])
    wrong = draw.choice([" ".join([first] * other_times + [second]), " ".join([second] * times + [first])])
    return Task(f"Say {first} {times} times, then {second}.", right, wrong)


def _capitals(draw: Random) -> Task:
    first, second, other = draw.sample(WORDS, 3)
    wrong = draw.choice([f"{first} {second}".upper(), f"{first.upper()} {other}", f"{other.upper()} {second}"])
    return Task(f"Write {first} in capitals and {second} as it is.", f"{first.upper()} {second}", wrong)


def _replace(draw: Random) -> Task:
    old, new, *others = draw.sample(WORDS, 4)
    words = [old, *others]
    draw.shuffle(words)
    right = [new if word == old else word for word in words]
    wrong = draw.choice([words, [word for word in words if word != old], [*right[1:], right[0]]])
    return Task(f"Put {new} for {old}: {' '.join(words)}", " ".join(right), " ".join(wrong))


def _alphabet(draw: Random) -> Task:
    words = draw.sample(WORDS, 3)
    right = sorted(words)
    wrong = list(right)
    i, j = draw.sample(range(3), 2)
    wrong[i], wrong[j] = wrong[j], wrong[i]
    return Task(f"Order by letter: {' '.join(words)}", " ".join(right), " ".join(wrong))


SKILLS: dict[str, tuple[Callable[[Random], Task], ...]] = {
    "math": (_sums, _differences, _largest, _above),
    "code": (_reverse, _sort, _range, _join),
    "instruct": (_repeat, _capitals, _replace, _alphabet),
}
