"""Peak memory of a student rank under every engine, beside DDP's, and against a formula.

    python jobs/bench/engines.py [--hidden 512] [--layers 24] [--vocab 16384] [--workers 2] [--engines ddp] [--quick]

Each engine loads the model, does two optimiser steps of two micro-batches, writes a checkpoint's part and exports the
model, on `--workers` processes (gloo, float32), one engine after the other. What counts is the resident memory that is
the process's own (RssAnon; weights that are read from a mapped file are not counted) beyond what it had before the
engine, at its highest, of the rank that used most.

With P parameters of 4 bytes, n ranks and U parameters of the largest units, a step needs, without activations,

    DDP      20 P                  weights, gradients, DDP's buckets of them, two moments
    ZeRO-1   8 P + 16 P / n        weights and gradients whole; masters, their gradients and moments shared out
    FSDP2    16 P / n + 16 U       all shared out; of a unit weights, gradients, and what gathers and scatters them
    ZeRO-3   20 P / n + 16 U       the same, with masters beside the weights also in float32

where U counts the output layer and a decoder layer, for both are gathered at a time.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import tempfile
import threading
import time
import warnings
from multiprocessing import get_context
from pathlib import Path

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("MALLOC_MMAP_THRESHOLD_", str(2**18))  # what is freed goes back to the system, and is not counted

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from measure import machine
from transformers import LlamaConfig, LlamaForCausalLM

from rayfuse.batch import Counts, FusionBatch
from rayfuse.config import SFT, Student
from rayfuse.quickstart.tiny_models import STYLES, make_tokenizer
from rayfuse.stages.sft import sft_loss
from rayfuse.student.engines import ENGINES

FORMS = {
    "ddp": {},
    "zero1": {"engine": "deepspeed", "zero_stage": 1},
    "fsdp2": {"engine": "fsdp2"},
    "zero3": {"engine": "deepspeed", "zero_stage": 3},
}
MIB = 2**20


class OwnMemory:
    """The process's own resident memory, at its highest since `start`."""

    def __init__(self) -> None:
        self.before = self.most = self._now()
        self.running = True
        self.thread = threading.Thread(target=self._watch, daemon=True)
        self.thread.start()

    @staticmethod
    def _now() -> int:
        text = Path("/proc/self/status").read_text(encoding="utf-8")
        found = re.search(r"RssAnon:\s+(\d+) kB", text)
        assert found is not None
        return int(found[1]) * 1024

    def _watch(self) -> None:
        while self.running:
            self.most = max(self.most, self._now())
            time.sleep(0.002)

    def peak(self) -> int:
        """Bytes beyond what there was at the start; starts again from here."""
        self.most = max(self.most, self._now())
        found, self.most = self.most - self.before, 0
        return found


def make_world(folder: Path, args: argparse.Namespace) -> tuple[str, dict[str, int]]:
    """An untied Llama of the given size; its folder, and the parameters of all, the root and a layer."""
    tokenizer = make_tokenizer(next(iter(STYLES.values())), ["a text", "and another one"])
    config = LlamaConfig(
        vocab_size=args.vocab,
        hidden_size=args.hidden,
        intermediate_size=8 * args.hidden // 3,
        num_hidden_layers=args.layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    sizes = {
        "all": sum(p.numel() for p in model.parameters()),
        "root": model.lm_head.weight.numel(),
        "layer": sum(p.numel() for p in model.model.layers[0].parameters()),
    }
    return str(folder), sizes


def formula(form: str, sizes: dict[str, int], workers: int) -> float:
    """Bytes that a rank needs, without activations."""
    whole, units = sizes["all"], sizes["root"] + sizes["layer"]
    if form == "ddp":
        return 20 * whole
    if form == "zero1":
        return 8 * whole + 16 * whole / workers
    return (20 if form == "zero3" else 16) * whole / workers + 16 * units


def batch_of(vocab: int, seed: int) -> FusionBatch:
    """Two samples of 64 random tokens, of which each second half is learnt."""
    generator = np.random.default_rng(seed)
    ids = generator.integers(1, min(vocab, 256), (2, 64))
    positions = np.concatenate([np.arange(32, 63) + 64 * row for row in range(2)])
    labels = ids.reshape(-1)[positions + 1]
    return FusionBatch(ids, np.ones_like(ids), positions, labels, np.repeat([0, 1], 31))


def work(rank: int, workers: int, form: str, model: str, vocab: int, out: Path) -> None:
    """One rank's life with one engine; its peaks go into a file."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(workers)}
    store = dist.FileStore(str(out / f"meet-{form}"), workers)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=workers)
    student = Student(model=model, workers=workers, **FORMS[form])
    if form.startswith("zero"):
        import deepspeed  # noqa: F401 - its own memory is not the model's
    stage = SFT(steps=2)
    memory = OwnMemory()
    engine = ENGINES[student.engine](student, model, stage, torch.device("cpu"))
    peaks = {"load": memory.peak()}
    for step in range(2):
        batches = [batch_of(vocab, 10 * step + 2 * rank + index) for index in range(2)]
        totals = Counts.of_array(2 * workers * batches[0].counts.as_array())
        for index, batch in enumerate(batches):
            with engine.accumulate(last=index == 1):
                loss, _ = sft_loss(stage, engine.score(batch, 4), batch, totals)
                engine.backward(loss)
        engine.step(1e-3)
    peaks["step"] = memory.peak()
    for name, tensors in engine.state().items():
        peaks["part"] = sum(value.numel() * value.element_size() for value in tensors.values())
        del name
    peaks["save"] = memory.peak()
    folder = out / f"model-{form}"
    folder.mkdir(exist_ok=True)
    engine.barrier()
    engine.export(folder)
    peaks["export"] = memory.peak()
    engine.barrier()
    (out / f"{form}-{rank}.json").write_text(json.dumps(peaks), encoding="utf-8")
    dist.destroy_process_group()


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--vocab", type=int, default=16_384)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--engines", nargs="+", choices=FORMS, default=list(FORMS))
    parser.add_argument("--quick", action="store_true", help="a small model, to see that it runs")
    args = parser.parse_args()
    if args.quick:
        args.hidden, args.layers, args.vocab = 64, 2, 2048
    get_context("forkserver").set_forkserver_preload(["torch", "transformers.models.llama.modeling_llama"])
    print(machine())
    with tempfile.TemporaryDirectory() as temporary:
        out = Path(temporary)
        model, sizes = make_world(out / "world", args)
        print(
            f"{sizes['all'] / 1e6:.0f}M parameters, output layer {sizes['root'] / 1e6:.1f}M, layer "
            f"{sizes['layer'] / 1e6:.1f}M; {args.workers} ranks, float32"
        )
        whole = None
        for form in args.engines:
            parameters = (args.workers, form, model, args.vocab, out)
            mp.start_processes(work, parameters, nprocs=args.workers, start_method="forkserver")
            ranks = [
                json.loads((out / f"{form}-{rank}.json").read_text(encoding="utf-8")) for rank in range(args.workers)
            ]
            most = {phase: max(peaks.get(phase, 0) for peaks in ranks) / MIB for phase in ranks[0]}
            peak = max(value for phase, value in most.items() if phase != "part")
            whole = whole or peak
            needed = formula(form, sizes, args.workers) / MIB
            phases = ", ".join(f"{phase} {value:,.0f}" for phase, value in most.items())
            print(
                f"{form:6} peak of a rank {peak:7,.0f} MiB  {peak / whole:4.2f} x DDP  formula {needed:7,.0f} MiB, "
                f"{peak / needed:4.2f} x  ({phases})"
            )


if __name__ == "__main__":
    main()
