"""An OpenAI-compatible vLLM server of a model, on the CPU and for as long as a block runs: for tests and benchmarks.

vLLM lives in an environment of its own (`make vllm` makes `.venv-vllm`; RAYFUSE_VLLM_PYTHON names another).
"""

import ctypes
import os
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parent.parent
START_S = 900.0
"""A server imports vLLM in three processes one after the other: 20 s on an idle machine, minutes on a busy one."""
ONE_PROCESS_A_CORE = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


@dataclass(frozen=True)
class Server:
    """A running server.

    Attributes:
        url: base address, for example http://127.0.0.1:41234/v1.
        api_key: what `Authorization: Bearer` must carry.
        model: the name under which the server knows its model.
        folder: the model's weights and tokenizer.
        max_logprobs: the most log-probabilities that it gives per position.
        max_model_len: its context length in tokens.
        process: its main process.
    """

    url: str
    api_key: str
    model: str
    folder: Path
    max_logprobs: int
    max_model_len: int
    process: subprocess.Popen


def vllm_python() -> str | None:
    """The interpreter in which vLLM is installed, or None where there is none."""
    python = os.environ.get("RAYFUSE_VLLM_PYTHON") or str(ROOT / ".venv-vllm" / "bin" / "python")
    return python if Path(python).exists() else None


@contextmanager
def start_server(
    python: str,
    folder: Path,
    log: Path,
    *,
    api_key: str = "a-key-for-tests-only",
    max_logprobs: int = 20,
    max_model_len: int = 1024,
    served_name: str = "smollm2",
) -> Iterator[Server]:
    """Run `vllm serve` on the CPU until the block ends; everything it started ends with it, or with this process.

    Raises RuntimeError with the end of its log where it does not come up within START_S.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder)]
    command += ["--served-model-name", served_name, "--host", "127.0.0.1", "--port", str(port)]
    command += ["--dtype", "float32", "--max-model-len", str(max_model_len), "--max-logprobs", str(max_logprobs)]
    command += ["--max-num-batched-tokens", "1024", "--max-num-seqs", "16", "--enforce-eager"]
    command += ["--kv-cache-memory-bytes", str(2**28)]
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "RAY_ADDRESS")}
    environment |= {**ONE_PROCESS_A_CORE, "VLLM_API_KEY": api_key, "VLLM_NO_USAGE_STATS": "1"}
    with log.open("w") as output:
        process = subprocess.Popen(
            command, env=environment, stdout=output, stderr=subprocess.STDOUT, preexec_fn=_end_with_parent
        )
    try:
        _wait_until_healthy(process, f"http://127.0.0.1:{port}/health", log)
        url = f"http://127.0.0.1:{port}/v1"
        yield Server(url, api_key, served_name, folder, max_logprobs, max_model_len, process)
    finally:
        _end(process)


def _end_with_parent() -> None:
    """Linux: this child gets SIGTERM when the test process is gone, however it ended."""
    ctypes.CDLL("libc.so.6", use_errno=True).prctl(1, signal.SIGTERM)


def _wait_until_healthy(process: subprocess.Popen, url: str, log: Path) -> None:
    deadline = time.monotonic() + START_S
    while True:
        try:
            with urllib.request.urlopen(url, timeout=10):
                return
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            ended = process.poll()
            if ended is not None or time.monotonic() > deadline:
                state = f"ended with {ended}" if ended is not None else f"not up after {START_S:.0f} s"
                raise RuntimeError(f"the vLLM server {state}:\n{log.read_text(encoding='utf-8')[-3000:]}") from None
            time.sleep(1.0)


def _end(process: subprocess.Popen) -> None:
    """End the server and the processes that it started."""
    try:
        family = psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        family = []
    process.terminate()
    try:
        process.wait(30)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    for child in family:
        try:
            child.kill()
        except psutil.NoSuchProcess:
            continue
