"""The number that an answer ends in, as a table of what people and models write."""

from fractions import Fraction

import pytest

from rayfuse.evaluation.numbers import final_number, last_boxed, same_number
from rayfuse.evaluation.scores import SCORES

ANSWERS = [
    ("42", "42"),
    ("The answer is 42.", "42"),
    ("She has 3 apples and 5 pears, so 8 in all.", "8"),
    ("#### 18", "18"),
    # signs, differences, ranges
    ("-3", "-3"),
    ("x = -3", "-3"),
    ("(-3)", "-3"),
    ("$-3$", "-3"),
    ("= - 3", "-3"),
    ("\u22123", "-3"),
    ("it is \u2212 7", "7"),  # behind a word a dash with a space is punctuation
    ("10-3", "3"),
    ("10 - 3", "3"),
    ("pages 10\u201320", "20"),
    ("10 to 20", "20"),
    ("GPT-4", "4"),
    ("+7", "7"),
    # separators
    ("1,234", "1234"),
    ("1,234,567.25", "1234567.25"),
    ("21,29", "29"),
    ("1,2,3", "3"),
    ("100, 200", "200"),
    ("1{,}234", "1234"),
    (r"10,\!000", "10000"),
    (r"1\,234", "1234"),
    ("12\u202f345", "12345"),
    ("1_000", "1000"),
    # decimals
    (".5", "1/2"),
    ("-.5", "-1/2"),
    ("0.50", "1/2"),
    ("It is 5.", "5"),
    ("3.14.", "3.14"),
    # fractions, mixed numbers
    ("1/2", "1/2"),
    ("-1/2", "-1/2"),
    (r"\frac{1}{2}", "1/2"),
    (r"-\frac{1}{2}", "-1/2"),
    (r"\frac{-1}{2}", "-1/2"),
    (r"\dfrac{10}{4}", "5/2"),
    (r"\frac12", "1/2"),
    (r"\tfrac{1,000}{3}", "1000/3"),
    ("3 1/2", "7/2"),
    (r"3\frac{1}{2}", "7/2"),
    ("-3 1/2", "-7/2"),
    ("½", "1/2"),
    ("3½", "7/2"),
    ("12/25/2020", "2020"),
    ("1/0", None),
    # powers
    ("1e3", "1000"),
    ("2.5E-3", "1/400"),
    (r"3 \times 10^{5}", "300000"),
    ("3 × 10^-2", "3/100"),
    ("3*10^4", "30000"),
    ("10²", "100"),
    ("2^{10}", "1024"),
    ("1e999999999", None),
    ("9" * 5000, None),
    # per cent, currency, units
    ("$1,250.00", "1250"),
    (r"\$18", "18"),
    ("-$5", "-5"),
    ("€ 20", "20"),
    ("USD 5", "5"),
    ("Rs.500", "500"),
    ("5kg", "5"),
    ("5 m²", "5"),
    (r"25 \text{ cm}^2", "25"),
    (r"90^\circ", "90"),
    ("2nd", "2"),
    ("CO2", None),
    # digits of other scripts
    ("４２", "42"),
    ("٤٢", "42"),
    # boxed
    (r"\boxed{7}", "7"),
    (r"First 3, then \boxed{7}, as 2 of 9 say.", "7"),
    (r"\boxed{3} or rather \boxed{4}", "4"),
    (r"\boxed{\frac{1}{2}}", "1/2"),
    (r"$\boxed{x = \text{-}5}$", "-5"),
    (r"\boxed{\text{5 apples}}", "5"),
    (r"\boxed{1,234}", "1234"),
    (r"\boxed 7", "7"),
    (r"\boxed{12", "12"),
    (r"\fbox{9} of 10", "9"),
    (r"It was 5: \boxed{\text{yes}}", None),
    (r"\boxed{2\sqrt{3}}", None),
    (r"\boxed{5\pi}", None),
    ("", None),
    ("no number", None),
]


@pytest.mark.parametrize(("answer", "value"), ANSWERS, ids=[repr(answer)[:30] for answer, _ in ANSWERS])
def test_an_answer_ends_in_its_number(answer, value):
    found = final_number(answer)
    assert (None if found is None else found.value) == (None if value is None else Fraction(value))


@pytest.mark.parametrize(
    ("answer", "reference", "same"),
    [
        ("50%", "50", True),
        (r"\boxed{50\%}", "50", True),
        ("50 percent", "0.5", True),
        ("0.5", "50%", True),
        ("50%", "50 %", True),
        ("50%", "0.5%", False),
        ("50%", "5", False),
        (r"\boxed{0.5}", r"\frac{1}{2}", True),
        ("1,000", "1000.0", True),
        ("0.333", "1/3", False),
        ("10-3", "-3", False),
        ("21,29", "2129", False),
        (".5", "5", False),
        (r"\frac{1}{2}", "2", False),
        ("none", "none", False),
    ],
)
def test_the_number_score(answer, reference, same):
    assert same_number(answer, reference) is same
    assert SCORES["number"](answer, reference) is same


def test_a_number_is_equal_to_itself_in_either_order():
    values = [answer for answer, value in ANSWERS if value is not None]
    assert all(same_number(one, one) for one in values)
    assert all(same_number(one, other) == same_number(other, one) for one in values for other in values)


def test_braces_in_a_box_are_matched():
    assert last_boxed(r"\boxed{a{b}{c{d}}} e}") == "a{b}{c{d}}"
    assert last_boxed("no box") is None
