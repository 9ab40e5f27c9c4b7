"""What the teachers' signals cost: bytes per token, packing, encoding and the store; peers are lists of dicts.

    python jobs/bench/signals.py [--rows 64 256 1024] [--samples 64] [--k 10] [--runs 5] [--quick]

A row is one predicted position of one teacher ("token" in the lines below). The peers are the same rows as others ship
them: per position a dict of token id -> log-probability and the actual token's log-probability, as one list per sample,
through pickle and through JSON (16 samples of them only, they are slow). Everything runs on one thread, and speeds are
per second of processor time.
"""

import argparse
import json
import pickle
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from measure import alternate, machine

from rayfuse.config import STAGES
from rayfuse.prepare.targets import fields_read
from rayfuse.signals.codec import decode, encode, pack, unpack
from rayfuse.signals.store import SignalStore
from rayfuse.signals.topk import FIELDS, TopKSignals

VOCABULARY = 151_936
ABOUT = {"fingerprint": "0" * 32, "key": "0" * 64}
PEER_SAMPLES = 16


def random_signals(
    rows: int, k: int, generator: np.random.Generator, *, response_bytes: int | None = None
) -> TopKSignals:
    """Valid signals of `rows` positions; the tokens cut a response of `response_bytes` (default 4 per token) evenly."""
    size = 4 * (rows - 1) if response_bytes is None else response_bytes
    logps = -np.sort(generator.exponential(2.0, (rows, k)).astype(np.float32), axis=1)
    logps -= np.log(np.exp(logps).sum(1, keepdims=True) * 1.05)
    return TopKSignals(
        logps=logps.astype(np.float16),
        ids=generator.integers(0, VOCABULARY, (rows, k), dtype=np.int32),
        lse=generator.normal(20, 3, rows).astype(np.float32),
        token_logps=-generator.exponential(1.0, rows).astype(np.float32),
        byte_ends=(np.arange(1, rows) * size) // max(1, rows - 1),
    )


def as_dicts(signals: TopKSignals) -> list[dict[str, Any]]:
    """The same answer as an inference server sends it: a dict per position, token ids as keys."""
    return [
        {"logprob": token, "top_logprobs": dict(zip(map(str, ids), logps, strict=True))}
        for token, ids, logps in zip(
            signals.token_logps.tolist(), signals.ids.tolist(), signals.logps.tolist(), strict=True
        )
    ]


def sizes(rows: int, k: int, generator: np.random.Generator) -> dict[str, float]:
    """Print bytes per token on the wire and in the store; return those of each field on the wire."""
    signals = random_signals(rows, k, generator)
    signals.validate(VOCABULARY)
    packed = pack([signals])
    fields = {name: packed[name].nbytes / rows for name in ("logps", "lse", "token_logps", "widths")}
    fields["ids"] = (packed["ids_low"].nbytes + packed["ids_high"].nbytes) / rows
    wire = sum(array.nbytes for array in packed.values()) / rows
    store = len(encode(signals, ABOUT)) / rows
    dicts = as_dicts(signals)
    pickled, text = len(pickle.dumps(dicts, protocol=5)) / rows, len(json.dumps(dicts).encode()) / rows
    print(
        f"bytes per token, {rows} rows: wire {wire:.1f}, store {store:.1f}, list of dicts pickled {pickled:.0f} "
        f"({pickled / wire:.1f} x), as JSON {text:.0f} ({text / wire:.1f} x)"
    )
    return fields


def speeds(rows: int, samples: int, k: int, runs: int, generator: np.random.Generator, folder: Path) -> None:
    """Tokens per second and core of every way, the store on local disk included."""
    signals = [random_signals(rows, k, generator) for _ in range(samples)]
    packed, blobs = pack(signals), [encode(item, ABOUT) for item in signals]
    some = signals[: min(PEER_SAMPLES, samples)]
    dicts = [as_dicts(item) for item in some]
    pickles, texts = [pickle.dumps(item, protocol=5) for item in dicts], [json.dumps(item) for item in dicts]
    url, rounds = str(folder / f"store-{rows}"), iter(range(10**6))

    def put() -> None:
        store, turn = SignalStore(url), next(rounds)
        for index, item in enumerate(signals):
            assert store.put("f", f"{index % 256:02x}-{turn}-{index}", item)

    def get(*fields: str) -> None:
        store = SignalStore(url)
        for index in range(samples):
            assert store.get("f", f"{index % 256:02x}-0-{index}", fields or FIELDS) is not None

    def each(function: Callable[[Any], Any], items: Sequence[Any]) -> Callable[[], list[Any]]:
        return lambda: [function(item) for item in items]

    cases: dict[str, Callable[[], Any]] = {
        "pack": lambda: pack(signals),
        "unpack": lambda: unpack(packed),
        "validate": each(lambda item: item.validate(VOCABULARY), signals),
        "encode": each(lambda item: encode(item, ABOUT), signals),
        "decode": each(lambda blob: decode(blob, ABOUT), blobs),
        "store put": put,
        "store get": get,
        "store get, ranks": lambda: get("logps", "byte_ends"),
        "store get, token_logps": lambda: get("token_logps"),
        "list of dicts, pickle": each(lambda item: pickle.dumps(as_dicts(item), protocol=5), some),
        "list of dicts, unpickle": each(pickle.loads, pickles),
        "list of dicts, to JSON": each(lambda item: json.dumps(as_dicts(item)), some),
        "list of dicts, from JSON": each(json.loads, texts),
    }
    done = {name: len(some) if name.startswith("list") else samples for name in cases}
    results = alternate(cases, runs, clock=time.process_time)
    speed = {name: done[name] * rows / (milliseconds / 1e3) for name, (milliseconds, _) in results.items()}
    peers = {"encode": ("pickle", "to JSON"), "decode": ("unpickle", "from JSON")}
    for name, (milliseconds, _) in results.items():
        line = f"{rows:5} rows  {name:<25} {speed[name] / 1e6:9.2f}M tokens/s"
        if name.startswith("store"):
            line += f"  {1e3 * samples / milliseconds:7.0f} samples/s"
        if name in peers:
            line += "".join(f"  {speed[name] / speed[f'list of dicts, {way}']:6.1f} x {way}" for way in peers[name])
        print(line)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[64, 256, 1024], help="predicted positions per sample")
    parser.add_argument("--samples", type=int, default=64, help="samples per case")
    parser.add_argument("--k", type=int, default=10, help="kept logits per position")
    parser.add_argument("--runs", type=int, default=5, help="rounds; the median counts")
    parser.add_argument("--store", type=Path, help="folder for the store; default: a temporary one")
    parser.add_argument("--quick", action="store_true", help="a few seconds, numbers without meaning")
    args = parser.parse_args()
    if args.quick:
        args.rows, args.samples, args.runs = [32], 4, 1
    print(machine())
    generator = np.random.default_rng(0)
    folder = Path(tempfile.mkdtemp(prefix="rayfuse-bench-", dir=args.store))
    try:
        for rows in args.rows:
            fields = sizes(rows, args.k, generator)
        print(f"bytes per token, k {args.k}: " + ", ".join(f"{name} {size:.0f}" for name, size in fields.items()))
        for method in ("infifusion", "infigfusion", "infifpo", "bytekd"):
            asked = fields_read(STAGES[method].targets)
            size = sum(fields["widths" if name == "byte_ends" else name] for name in asked)
            print(f"bytes per token that {method} reads: {size:.0f} ({', '.join(asked)})")
        for rows in args.rows:
            speeds(rows, args.samples, args.k, args.runs, generator, folder)
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
