r"""The number that an answer ends in, as people and models write it.

What is in the last `\boxed{...}` counts, and else the whole text; of several numbers the last. Read are

    1,234,567  1{,}234  1\,234  1_000     separators only between groups of three: 21,29 is two numbers
    .5  5.  -3  − 3  (-3)  -$5            a dash behind a digit or a letter is no sign: 10-3 ends in 3
    1/2  \frac{1}{2}  \dfrac12  ½         fractions; 3 1/2, 3\frac{1}{2} and 3½ are mixed numbers
    2e-3  3 × 10^5  10^{-3}  10²          powers
    50%  50\%  50 percent                 fifty, or a half: see `same_number`

and digits of any script. Values are exact: 0.1 is 1/10. What holds a root or pi is no number here. Heavier tools that
compare formulas (math-verify) are not needed for numbers, and would make `1/3` of `0.333`.
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass
from fractions import Fraction

LARGEST_POWER = 400
"""Of any base: a hostile 1e999999999 is no number."""
LONGEST = 1000
"""Characters of a number; Python reads no integer of more than 4,300 digits."""

_SUPERSCRIPTS = {ord(mark): plain for mark, plain in zip("⁰¹²³⁴⁵⁶⁷⁸⁹⁻", "0123456789-", strict=True)}
_DASHES = dict.fromkeys(map(ord, "−‐‑‒–—﹣－"), "-")
_PLAIN = r"(?:\d{1,3}(?:,\d{3})+(?!,?\d)(?:\.\d+)?|\d+(?:\.\d+)?|\.\d+)"
_NUMBER = re.compile(
    rf"""(?<![A-Za-z0-9_.])(?:
        (?P<whole>\d+)[ ]+(?P<part>\d+)\s?/\s?(?P<of>\d+)(?!\s?/|\d)
      | (?<!/)(?P<over>{_PLAIN})\s?/\s?(?P<under>-?{_PLAIN})(?!\s?/|\d)
      | (?P<times>{_PLAIN})\s*×\s*10\^(?P<ten>-?\d+)
      | (?P<mantissa>{_PLAIN})[eE](?P<exponent>[-+]?\d+)(?![A-Za-z0-9])
      | (?P<base>{_PLAIN})\^(?P<power>-?\d+)
      | (?P<plain>{_PLAIN})
    )(?P<percent>\s*(?:%|per\s?cent\b))?""",
    re.VERBOSE,
)
_REWRITTEN = (
    (r"\\(?:left|right|displaystyle|bf|rm)\b", " "),
    (r"\\(?:text|textbf|textit|mathrm|mathbf|mbox|operatorname)\s*\{([^{}]*)\}", r" \1 "),
    (r"(?<=\d)(?:\{,\}|\\,|\\!,?|,\\!|_)(?=\d{3}(?!\d))", ","),
    (r"\\[,;:! ]|~", " "),
    (r"\\%", "%"),
    (r"\^\s*\{?\s*(?:\\circ|°)\s*\}?|°", " degrees "),
    (r"\\(?:times|cdot)(?![A-Za-z])|(?<=\d)\s*[x*·]\s*(?=10\s*\^)", "×"),
    (r"\^\s*\{\s*([-+]?\d+)\s*\}", r"^\1"),
    (r"(?<=[A-Za-z)])\s*\^\s*-?\d+", " "),  # the exponent of a unit
    (r"\s*\^\s*\+?", "^"),
    (r"\\[dt]?frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}", r" \1/\2 "),
    (r"\\[dt]?frac\s*(\d)\s*(\d)", r" \1/\2 "),
    (r"-\s*\\?[$€£¥₹]\s*(?=[\d.])", "-"),
    (r"\b(?:USD|EUR|GBP|INR|CNY|RMB|JPY|US|Rs\.?)\s*(?=[$\d])", " "),
    (r"\\?[$€£¥₹]", " "),
)
"""Notation that means the same, one pattern after the other."""
_NO_NUMBER = re.compile(r"\\sqrt|√|\\pi(?![A-Za-z])|π")


@dataclass(frozen=True)
class Number:
    """A value, and whether a per cent sign follows it."""

    value: Fraction
    percent: bool = False


def same_number(answer: str, reference: str) -> bool:
    """Whether both texts end in the same number.

    Where one of the two has a per cent sign, 50% is 50 as well as 0.5: people write the right answer to "what per cent"
    both ways.
    """
    got, wanted = final_number(answer), final_number(reference)
    if got is None or wanted is None:
        return False
    if got.percent == wanted.percent:
        return got.value == wanted.value
    share, other = (got.value, wanted.value) if got.percent else (wanted.value, got.value)
    return other in (share, share / 100)


def final_number(text: str) -> Number | None:
    """The number that a text ends in; None where it has none."""
    boxed = last_boxed(text)
    plain = _plain(text if boxed is None else boxed)
    if boxed is not None and _NO_NUMBER.search(plain):
        return None
    found = None
    for match in _NUMBER.finditer(plain):
        value = _value(match)
        if value is not None:
            found = Number(-value if _is_negative(plain, match.start()) else value, match["percent"] is not None)
    return found


def last_boxed(text: str) -> str | None:
    r"""What is inside the last `\boxed{...}` (or `\boxed x`), braces in it included; None where there is none."""
    start = max(text.rfind("\\boxed"), text.rfind("\\fbox"))
    if start < 0:
        return None
    rest = text[start:].partition("box" if text.startswith("\\fbox", start) else "boxed")[2].lstrip()
    if not rest.startswith("{"):
        return rest.split("$")[0].split(maxsplit=1)[0] if rest.strip("$ \n") else ""
    depth = 0
    for index, character in enumerate(rest):
        depth += {"{": 1, "}": -1}.get(character, 0)
        if depth == 0:
            return rest[1:index]
    return rest[1:]  # cut off while it was written


def _plain(text: str) -> str:
    """The text in one notation: ASCII digits, - / ^ ×, no LaTeX around numbers."""
    text = re.sub(r"(?<=\d)(?=[⁰¹²³⁴⁵⁶⁷⁸⁹⁻])", "^", text).translate(_SUPERSCRIPTS)
    text = "".join(f" {mark}" if unicodedata.decomposition(mark).startswith("<fraction>") else mark for mark in text)
    text = re.sub(r"(?<=\d)[\u2009\u202f\u00a0](?=\d{3}(?!\d))", ",", text)
    text = unicodedata.normalize("NFKC", text).translate(_DASHES).replace("\u2044", "/")
    text = "".join(str(unicodedata.decimal(mark)) if mark.isdecimal() else mark for mark in text)
    for pattern, plain in _REWRITTEN:
        text = re.sub(pattern, plain, text)
    return text


def _is_negative(plain: str, start: int) -> bool:
    """Whether the dash in front of a number is its sign, and not that of a range, a difference or a word."""
    before = plain[:start]
    dashed = before.rstrip(" ")
    if not dashed.endswith("-"):
        return False
    if dashed == before:  # -3
        return not re.search(r"[A-Za-z0-9)\]}%.]$", dashed[:-1])
    return not dashed[:-1].strip() or dashed[:-1].rstrip()[-1] in "=:([{,"  # - 3


def _value(match: re.Match[str]) -> Fraction | None:
    """What a match is worth; None where it is no number: divided by zero, too long, or too large a power."""
    if len(match[0]) > LONGEST:
        return None
    part = {name: text.replace(",", "") for name, text in match.groupdict("").items()}
    if part["whole"]:
        return int(part["whole"]) + Fraction(int(part["part"]), int(part["of"])) if int(part["of"]) else None
    if part["over"]:
        return Fraction(part["over"]) / Fraction(part["under"]) if Fraction(part["under"]) else None
    for number, power, base in (("times", "ten", "10"), ("mantissa", "exponent", "10"), ("base", "power", "")):
        if not part[number]:
            continue
        raised, exponent = Fraction(base or part[number]), part[power]
        if len(exponent) > 5 or abs(int(exponent)) > LARGEST_POWER or (raised == 0 and int(exponent) < 0):
            return None
        return (Fraction(part[number]) if base else Fraction(1)) * raised ** int(exponent)
    return Fraction(part["plain"])
