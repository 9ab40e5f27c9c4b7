"""Cost of alignment: `align` against TRL's walk on the same offsets, and `byte_ends`. One line per case.

    python jobs/bench/align.py [--quick]          (half a minute; needs the dev extra, for TRL and the tokenizers)

The two are timed in turn in one process; figures are medians of 15 rounds of 20 calls. The text is the source of the
standard library's argparse, the student SmolLM2's tokenizer, the teacher Mistral's tekken. TRL's walk takes and gives
Python lists, `align` takes and gives numpy arrays: each is timed on its own kind of input, without conversions.
Python's garbage collector is off meanwhile, as in timeit: the walk makes two lists per pair, which would set it off.
"""

from __future__ import annotations

import argparse
import gc
import sys
import warnings
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from measure import alternate, machine

from rayfuse.alignment.pairs import align
from rayfuse.alignment.token_bytes import byte_ends, encode_response
from tests.real_tokenizers import smollm2, tekken

CALLS = 20


def seconds_of(cases: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Median seconds of one call of each."""
    many = {name: lambda case=case: [case() for _ in range(CALLS)] for name, case in cases.items()}
    gc.disable()
    taken = alternate(many, rounds)
    gc.enable()
    return {name: milliseconds / 1e3 / CALLS for name, (milliseconds, _) in taken.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="tiny sizes, numbers without meaning")
    quick = parser.parse_args().quick
    sizes, rounds = ((64,), 1) if quick else ((256, 1024, 3072, 16384), 15)
    warnings.simplefilter("ignore")
    from trl.experimental.gold.gold_trainer import ULDLoss

    walk = ULDLoss._align_by_byte_offsets
    student, teacher = smollm2(), tekken()
    source = Path(argparse.__file__).read_text(encoding="utf-8")
    source_ends = encode_response(student, source)[1]
    print(machine())
    for tokens in sizes:
        text = source.encode()[: source_ends[tokens - 1]].decode()
        (ids, ends), (_, teacher_ends) = encode_response(student, text), encode_response(teacher, text)
        spans = [list(pairwise([0, *side.tolist()])) for side in (ends, teacher_ends)]
        groups = walk(*spans)[0]
        assert align(ends, teacher_ends).student[1:].tolist() == [group[-1] + 1 for group in groups]
        cases: dict[str, Callable[[], Any]] = {
            "align": lambda ends=ends, teacher_ends=teacher_ends: align(ends, teacher_ends),
            "walk": lambda spans=spans: walk(*spans),
            "byte_ends": lambda ids=ids: byte_ends(student, ids),
        }
        taken = seconds_of(cases, rounds)
        ours, trl, read = taken["align"], taken["walk"], taken["byte_ends"]
        print(
            f"{len(ends):6,} x {len(teacher_ends):6,} tokens, {len(groups):6,} pairs: align {ours * 1e6:6.0f} us, "
            f"TRL's walk {trl * 1e6:6.0f} us, {trl / ours:5.1f} times; byte_ends {len(ids) / read / 1e6:5.1f}M tokens/s"
        )


if __name__ == "__main__":
    main()
