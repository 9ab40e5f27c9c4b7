"""Processor time of each kind of target per student token and teacher, in a prepare task with everything else at hand.

    python jobs/bench/targets.py [--quick]          (about a minute; needs the dev extra, for the tokenizers)

The student has SmolLM2's tokenizer, the teachers Qwen's and Mistral's tekken. The text is the source of the standard
library's argparse, cut into samples; a teacher's top-K is drawn from the text's own tokens, with the token that follows
first. `mined` is shown twice: while it still looks for nearest tokens, and when it knows them.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import time
from itertools import pairwise
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from measure import machine
from transformers import PreTrainedTokenizerBase

from rayfuse.alignment.token_bytes import bytes_to_ids, encode_response, token_bytes
from rayfuse.batch import FusionBatch
from rayfuse.config import ByteKD, Model, Teacher
from rayfuse.data.render import Rendered
from rayfuse.data.sample import Sample
from rayfuse.prepare.spec import PrepareSpec
from rayfuse.prepare.targets import TARGETS, ScoredUnit, bare_targets
from rayfuse.prepare.vocabulary import Vocabularies, Vocabulary
from rayfuse.signals.topk import TopKSignals
from rayfuse.teachers.identity import IdentifiedTeacher
from tests.real_tokenizers import qwen, smollm2, tekken

K = 10
TOKENS = 256
KINDS = ("ranks", "tokens", "unmatched", "graphs", "carried", "mined")
CHANCES = np.array([0.6, 0.15, 0.08, 0.05, 0.03, 0.02, 0.02, 0.01, 0.01, 0.01])
END = 2


def vocabulary(tokenizer: PreTrainedTokenizerBase) -> Vocabulary:
    """Its tokens, with an end of turn that all share here."""
    return Vocabulary(token_bytes(tokenizer), bytes_to_ids(tokenizer), END)


def answer(tokenizer: PreTrainedTokenizerBase, text: str, candidates: np.ndarray, seed: int) -> TopKSignals:
    """What a teacher might say: the token that follows, and others of the same text."""
    ids, ends = encode_response(tokenizer, text)
    top = np.random.default_rng(seed).choice(candidates, (len(ids) + 1, K)).astype(np.int32)
    top[:, 0] = np.append(ids, END)
    logps = np.tile(np.log(CHANCES), (len(top), 1)).astype(np.float16)
    return TopKSignals(logps, top, np.zeros(len(top), np.float32), logps[:, 0].astype(np.float32), ends)


def make_unit(teacher: PreTrainedTokenizerBase, samples: int) -> tuple[ScoredUnit, FusionBatch]:
    """A unit as a prepare task has it after the teachers' answers came, and its batch without targets."""
    student, source = smollm2(), Path(argparse.__file__).read_text(encoding="utf-8")
    whole_ends = encode_response(student, source)[1]
    cuts = [0, *whole_ends[TOKENS - 1 :: TOKENS].tolist()][: samples + 1]
    texts = [source.encode()[a:b].decode() for a, b in pairwise(cuts)]
    encoded = [encode_response(student, text) for text in texts]
    rendered = [Rendered(np.zeros(1, np.int64), np.append(ids, END), ends) for ids, ends in encoded]
    candidates = encode_response(teacher, source)[0]
    vocabularies = Vocabularies.__new__(Vocabularies)
    vocabularies.student, vocabularies.teachers = vocabulary(student), [vocabulary(teacher)]
    model = Teacher(model="teacher", name="teacher")
    spec = PrepareSpec(Model(model="student"), (IdentifiedTeacher(model, ""),), "", K, "bytes", 1 << 20, stage=ByteKD())
    signals = [[answer(teacher, text, candidates, seed) for seed, text in enumerate(texts)]]
    read = [Sample((), text) for text in texts]
    unit = ScoredUnit(spec, vocabularies, read, rendered, signals)
    labels = np.concatenate([item.response_ids for item in rendered])
    none = np.zeros(0, dtype=np.int64)
    return unit, FusionBatch(none, none, none, labels, none, bare_targets(spec, read))


def microseconds(kind: str, unit: ScoredUnit, batch: FusionBatch) -> float:
    """Processor time per student token of one run of a kind."""
    fresh = ScoredUnit(unit.spec, unit.vocabularies, unit.samples, unit.rendered, unit.signals)  # nothing aligned yet
    begun = time.process_time()
    TARGETS[kind](fresh, batch)
    return (time.process_time() - begun) / len(batch.labels) * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="tiny sizes, numbers without meaning")
    quick = parser.parse_args().quick
    rounds, samples = (1, 1) if quick else (7, 8)
    print(machine())
    gc.disable()
    for name, tokenizer in (("qwen", qwen), ("tekken", tekken)):
        unit, batch = make_unit(tokenizer(), samples)
        batch = TARGETS["ranks"](unit, batch)
        for kind in KINDS:
            first = microseconds(kind, unit, batch)
            again = statistics.median(microseconds(kind, unit, batch) for _ in range(rounds))
            print(f"{name:7} {kind:10} {again:7.1f} us per token and teacher   (the first time {first:9.1f})")


if __name__ == "__main__":
    main()
