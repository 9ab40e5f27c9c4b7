"""Equivalence: which answers to a prompt say the same.

exact   the same text, ends stripped
final   the same final answer: what stands in \\boxed{}, else the same number (evaluation's score `number`)
tests   programs that pass the prompt's unit tests say the same; each that fails stands alone, and is wrong
none    free text: only equal texts say the same for certain; asked for by name, sources score every candidate instead
auto    one of these, chosen by the data; see `choose`
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rayfuse.consensus.candidates import Candidates
from rayfuse.data.prompts import Prompt
from rayfuse.evaluation.scores import SCORES

Judge = Callable[[Sequence[tuple[Prompt, str]]], list[float]]
"""Scores (prompt, response) pairs: 1 where the tests pass, else 0 (evaluation.judges.unit_tests)."""


@dataclass(frozen=True)
class Grouping:
    """Which answers of a prompt say the same.

    Attributes:
        groups: group of each answer, numbered from 0 in the order in which they first appear.
        right: the group that is known to be right, -1 where it is known that none is; None where nobody knows.
    """

    groups: tuple[int, ...]
    right: int | None = None

    @property
    def count(self) -> int:
        """Groups."""
        return max(self.groups, default=-1) + 1


@dataclass(frozen=True)
class Chosen:
    """An equivalence and why it is used.

    Attributes:
        name: exact, final, tests or none.
        reason: for people, with the numbers that decided.
    """

    name: str
    reason: str


def exact(candidates: Candidates) -> Grouping:
    """Answers with the same text, ends stripped."""
    return _grouped([answer.text.strip() for answer in candidates.answers], lambda one, other: one == other)


def final(candidates: Candidates) -> Grouping:
    """Answers with the same final answer; one that has neither a box nor a number goes by its text."""
    return _grouped([answer.text for answer in candidates.answers], same_final)


def same_final(one: str, other: str) -> bool:
    """Whether two answers end in the same: boxes with the same content or number, else the same last number."""
    boxes = [boxed(one), boxed(other)]
    ends = [one if box is None else box for box, one in zip(boxes, (one, other), strict=True)]
    if None not in boxes and _bare(ends[0]) == _bare(ends[1]):
        return True
    number = SCORES["number"]
    return ends[0].strip() == ends[1].strip() or number(ends[0], ends[1]) or number(ends[1], ends[0])


def boxed(text: str) -> str | None:
    """What stands in the last \\boxed{} of a text, braces inside it included; None where there is no whole one."""
    start = text.rfind(r"\boxed{")
    if start < 0:
        return None
    depth, begin = 1, start + len(r"\boxed{")
    for index in range(begin, len(text)):
        depth += {"{": 1, "}": -1}.get(text[index], 0)
        if not depth:
            return text[begin:index]
    return None


def _bare(text: str) -> str:
    """A formula without what changes nothing: white space, dollar signs, thin spaces, left and right."""
    return re.sub(r"\s|\$|\\[,;!]|\\left|\\right", "", text)


def _grouped(texts: Sequence[str], same: Callable[[str, str], bool]) -> Grouping:
    firsts: list[str] = []
    groups = []
    for text in texts:
        found = next((number for number, first in enumerate(firsts) if same(first, text)), len(firsts))
        if found == len(firsts):
            firsts.append(text)
        groups.append(found)
    return Grouping(tuple(groups))


def by_tests(candidates: Sequence[Candidates], judge: Judge) -> list[Grouping]:
    """Groupings by unit tests; a prompt without tests goes by its texts.

    Every different text of a prompt with tests runs once. The tests say which group is right, or that none is.
    """
    tested = [one for one in candidates if one.prompt.tests]
    pairs = [(one.prompt, text) for one in tested for text in dict.fromkeys(a.text for a in one.answers)]
    scores = iter(judge(pairs) if pairs else [])
    groupings = []
    for one in candidates:
        if not one.prompt.tests:
            groupings.append(exact(one))
            continue
        passed = {text: next(scores) > 0 for text in dict.fromkeys(answer.text for answer in one.answers)}
        texts = ["" if passed[answer.text] else f"fails: {answer.text}" for answer in one.answers]
        groups = _grouped(texts, lambda one, other: one == other).groups
        groupings.append(Grouping(groups, groups[texts.index("")] if "" in texts else -1))
    return groupings


def agreement(groupings: Sequence[Grouping]) -> float:
    """Share of the prompts with two answers or more in which at least two say the same; 0 where there are none."""
    several = [grouping for grouping in groupings if len(grouping.groups) > 1]
    return sum(grouping.count < len(grouping.groups) for grouping in several) / len(several) if several else 0.0


FEW = 0.2
"""An equivalence under which answers agree in fewer prompts than this does not compare them."""


def choose(name: str, candidates: Sequence[Candidates]) -> Chosen:
    """The equivalence that `name` asks for; where it is "auto", the first of these that fits:

    tests, where nine tenths of the prompts have tests; final, where half of the answers have a \\boxed{}; exact, where
    answers agree in a fifth of the prompts; final, where they do so by their last number and nine tenths have one;
    else none.
    """
    if name != "auto":
        return Chosen(name, "asked for")
    tests = sum(bool(one.prompt.tests) for one in candidates) / max(1, len(candidates))
    if tests >= 0.9:
        return Chosen("tests", f"{tests:.0%} of the prompts have tests")
    texts = [answer.text for one in candidates for answer in one.answers]
    boxes = sum(boxed(text) is not None for text in texts) / max(1, len(texts))
    if boxes >= 0.5:
        return Chosen("final", rf"{boxes:.0%} of the answers have a \boxed{{}}")
    by_text = agreement([exact(one) for one in candidates])
    if by_text >= FEW:
        return Chosen("exact", f"answers have the same text in {by_text:.0%} of the prompts")
    numbers = sum(any(digit.isdigit() for digit in text) for text in texts) / max(1, len(texts))
    by_end = agreement([final(one) for one in candidates])
    if numbers >= 0.9 and by_end >= FEW:
        return Chosen("final", f"{numbers:.0%} of the answers have a number, the last is the same in {by_end:.0%}")
    return Chosen(
        "none", f"answers have the same text in {by_text:.0%} of the prompts and the same last number in {by_end:.0%}"
    )


def groupings_of(name: str, candidates: Sequence[Candidates], judge: Judge | None = None) -> list[Grouping]:
    """Groupings by an equivalence's name; `judge` runs the tests where it is "tests"."""
    if name == "tests":
        assert judge is not None
        return by_tests(candidates, judge)
    return [{"exact": exact, "final": final, "none": exact}[name](one) for one in candidates]
