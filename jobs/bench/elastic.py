"""Elastic teachers: seconds until another copy works, seconds from a lost node to full throughput, bytes over HTTP.

    python jobs/bench/elastic.py [--units 40] [--skip nodes] [--quick]

Three parts, on clusters that this script starts and ends; the teacher is a small Llama made on the spot:
- http: bytes per token of `POST /score` as JSON and as safetensors, against the same signals as they travel through
  Ray's object store; and tokens per second of each way, the ways taking turns.
- copies: from `rayfuse teachers scale` to a second copy that answers, and to none.
- nodes: three copies on three nodes answer a steady flow of units; one node is killed, and another one comes. Seconds
  until units are answered at nine tenths of the rate before (over `--window` seconds).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from urllib.request import Request, urlopen

os.environ["RAY_ENABLE_AUTO_CONNECT"] = "0"  # Serve's threads outlive a cluster, and must not connect to the next

import ray
from measure import machine
from ray import cloudpickle, serve
from ray.cluster_utils import Cluster
from rich.console import Console

from rayfuse import cluster
from rayfuse.config import Http, Teacher
from rayfuse.data.sample import Sample
from rayfuse.quickstart.skills import make
from rayfuse.quickstart.tiny_models import STYLES, make_model, make_tokenizer, save
from rayfuse.signals.codec import pack
from rayfuse.teachers.http.served import served
from rayfuse.teachers.identity import IdentifiedTeacher, fingerprint
from rayfuse.teachers.serving import applications, wishes
from rayfuse.teachers.serving.client import TeacherClient

K, UNIT = 10, 8
TOKEN = "benchmark-on-loopback"
PATIENCE_S = 300.0
SAFETENSORS = {"Accept": "application/x-safetensors"}


def make_teacher(folder: Path, copies: int, layers: int) -> tuple[IdentifiedTeacher, list[Sample]]:
    """A teacher with its fingerprint, and a unit for it."""
    rows = make("math", 200, seed=1)
    tokenizer = make_tokenizer(STYLES["math"], [f"{row['prompt']} {row['response']}" for row in rows])
    save(make_model(tokenizer, 0, layers=layers), tokenizer, folder / "teacher")
    replicas = {"max": copies, "idle_s": 3600, "upscale_s": 0, "downscale_s": 0}
    teacher = Teacher.model_validate({"model": str(folder / "teacher"), "name": "bench", "replicas": replicas})
    samples = [Sample((("user", row["prompt"]),), row["response"]) for row in rows[:UNIT]]
    return IdentifiedTeacher(teacher, fingerprint(teacher, K)), samples


def running(named: IdentifiedTeacher) -> int:
    """Copies that answer."""
    (found,) = serve.status().applications[applications.application_name(named)].deployments.values()
    return found.replica_states.get("RUNNING", 0)


def seconds_until(condition: Callable[[], bool]) -> float:
    """How long it takes until something is so."""
    begun = time.monotonic()
    while not condition():
        if time.monotonic() - begun > PATIENCE_S:
            raise SystemExit(f"not within {PATIENCE_S:.0f} s")
        time.sleep(0.1)
    return time.monotonic() - begun


def over_http(named: IdentifiedTeacher, samples: Sequence[Sample], units: int) -> None:
    """Bytes and tokens per second of HTTP against the object store."""
    os.environ["RAYFUSE_HTTP_TOKEN"] = TOKEN
    rows = [{"prompt": sample.messages[0].content, "response": sample.response} for sample in samples]
    body = json.dumps({"teacher": "bench", "samples": rows}).encode()
    headers = {"Authorization": f"Bearer {TOKEN}", "Content-Type": "application/json"}
    client = TeacherClient(named)
    signals = client.score(samples)()
    tokens = sum(map(len, signals))
    with served([named], K, Http(port=0), Console(quiet=True)) as server:
        assert server is not None

        def ask(extra: dict[str, str]) -> bytes:
            return urlopen(Request(f"{server.url}/score", body, {**headers, **extra})).read()

        sizes = {
            "object store": len(cloudpickle.dumps(pack(signals))),
            "HTTP safetensors": len(ask(SAFETENSORS)),
            "HTTP JSON": len(ask({})),
        }
        ways: dict[str, Callable[[], object]] = {
            "object store": lambda: client.score(samples)(),
            "HTTP safetensors": lambda: ask(SAFETENSORS),
            "HTTP JSON": lambda: ask({}),
        }
        took: dict[str, list[float]] = {way: [] for way in ways}
        for _ in range(units):
            for way, call in ways.items():
                begun = time.perf_counter()
                call()
                took[way].append(time.perf_counter() - begun)
    for way, size in sizes.items():
        speed = tokens / statistics.median(took[way])
        times = size / sizes["object store"]
        print(f"{way:<17} {size / tokens:7.1f} bytes per token ({times:.2f} x)  {speed:,.0f} tokens/s")


def add_a_copy(named: IdentifiedTeacher, samples: Sequence[Sample]) -> None:
    """Seconds from the wish for a second copy to its being there, and from no wish to no copy."""
    name = applications.application_name(named)
    TeacherClient(named).score(samples)()
    wishes.wish(name, wishes.PINNED, 2, 2)
    wishes.resize(name)
    print(f"a second copy answers after {seconds_until(lambda: running(named) == 2):.1f} s")
    wishes.wish(name, wishes.PINNED, 1, 1)
    wishes.resize(name)
    print(f"and is gone after {seconds_until(lambda: running(named) == 1):.1f} s")
    wishes.withdraw(name, wishes.PINNED)


@contextmanager
def flow(named: IdentifiedTeacher, samples: Sequence[Sample], at_once: int) -> Iterator[list[float]]:
    """A steady flow of units, `at_once` in flight; the times at which they were answered."""
    answered: list[float] = []
    over = threading.Event()

    def ask() -> None:
        client = TeacherClient(named)
        while not over.is_set():
            client.score(samples)()
            answered.append(time.monotonic())

    threads = [threading.Thread(target=ask) for _ in range(at_once)]
    for thread in threads:
        thread.start()
    try:
        yield answered
    finally:
        over.set()
        for thread in threads:
            thread.join()


def lose_a_node(folder: Path, window: float, layers: int) -> None:
    """Seconds from the loss of one of three nodes until units are answered as fast as before, on a new node."""
    system = {"health_check_period_ms": 500, "health_check_timeout_ms": 2000, "health_check_failure_threshold": 5}
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "_system_config": system})
    nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
    ray.init(cluster.address, logging_level="ERROR", log_to_driver=False)
    try:
        named, samples = make_teacher(folder, 3, layers)
        with applications.borrowed([named], K), flow(named, samples, 9) as answered:
            print(f"three copies on three nodes after {seconds_until(lambda: running(named) == 3):.1f} s")
            time.sleep(3 * window)
            full = sum(at > time.monotonic() - 3 * window for at in answered) / 3
            lost = time.monotonic()
            cluster.remove_node(nodes[0], allow_graceful=False)
            cluster.add_node(num_cpus=1)
            noticed = seconds_until(lambda: running(named) < 3)
            copies = noticed + seconds_until(lambda: running(named) == 3)
            seconds_until(lambda: sum(at > time.monotonic() - window for at in answered) >= 0.9 * full)
            whole = time.monotonic() - lost
            longest = max((b - a for a, b in pairwise(answered) if b > lost), default=0.0)
        print(f"node lost: three copies again after {copies:.1f} s, full throughput after {whole:.1f} s")
        print(f"longest time without an answer meanwhile: {longest:.1f} s")
    finally:
        serve.shutdown()
        ray.shutdown()
        cluster.shutdown()


def main() -> None:
    """Run the parts that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--units", type=int, default=40, help="units asked each way")
    parser.add_argument("--window", type=float, default=5.0, help="seconds of one measurement of the rate")
    parser.add_argument("--layers", type=int, default=6, help="of the teacher")
    parser.add_argument("--skip", nargs="*", default=[], choices=["http", "copies", "nodes"], help="parts left out")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that it runs")
    options = parser.parse_args()
    if options.quick:
        options.units, options.window, options.layers = 2, 2.0, 1
    print(machine())
    with tempfile.TemporaryDirectory() as folder:
        if {"http", "copies"} - set(options.skip):
            cluster.start_embedded(4)
            named, samples = make_teacher(Path(folder), 2, options.layers)
            with applications.borrowed([named], K):
                if "http" not in options.skip:
                    over_http(named, samples, options.units)
                if "copies" not in options.skip:
                    add_a_copy(named, samples)
            serve.shutdown()
            cluster.end_embedded()
        if "nodes" not in options.skip:
            lose_a_node(Path(folder), options.window, options.layers)


if __name__ == "__main__":
    main()
