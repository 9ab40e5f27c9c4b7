"""The benchmarks run: each script with tiny sizes prints its lines and ends well. Their numbers are not looked at."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
SCRIPTS = {
    "align": ([], [r"tokens, +\d+ pairs: align .* TRL's walk .* times; byte_ends"]),
    "head": ([], [r"^plain chunked cross-entropy .* x best chunked CE", r"^fused head, CE \+ ULD \+ GLD .* x best"]),
    "signals": (
        [],
        [
            r"bytes per token, k 10: .* widths 1, ids 30",
            r"32 rows  encode .* x pickle .* x to JSON",
            "store get",
        ],
    ),
    "step": ([], [r"^sft .* 1\.000 x SFT", r"^infifusion .* x SFT", r"^infigfusion .* x SFT"]),
    "scale": ([], [r"^# The Phi-4 run on paper", r"^\| 8 \| cold \|", r"^\| K \| 1000 \|"]),
    "engines": ([], [r"^ddp +peak of a rank .* 1\.00 x DDP", r"^fsdp2 +peak of a rank .* x DDP", r"^zero3 .* formula"]),
    "stream": (
        [],
        [r"^padding, chat", r"^3 teachers  raw actors .* 1\.00 x", r"^3 teachers .* cold store", r"^2 replicas"],
    ),
    "teachers": ([], [r"^score, transformers .* 1\.00 x transformers"]),
    "elastic": (
        [],
        [r"^HTTP safetensors .* bytes per token", r"^a second copy answers after", r"^node lost: three copies again"],
    ),
    "targets": ([], [r"^qwen +tokens .* us per token and teacher", r"^tekken +mined .* us per token"]),
    "gw": ([], [r"^n 5 .* closed form", r"^n 70 .* POT batched .* gap"]),
    "losses": (
        [],
        [r"^  TRL ULD extended, hybrid .* x", r"^  MultiLevelOT .* x", r"^  rayfuse ULD aligned .* 1\.00 x"],
    ),
    "plan": ([], [r"^tiny .* memory, MB: predicted .* ratio .* step, s: predicted .* ratio"]),
    "start": ([], [r"^import, check +\d", r"^check teachers +\d", r"^01-infifusion +\d", r"^all +\d"]),
    "wait": ([], [r"^1 replicas, 0\.50 x .* waits .* %", r"^2 replicas, 1\.00 x"]),
    "consensus": (["--cache"], [r"^f0 +SFT on labels, 30% wrong +\d", r"^f0 +SFT on chosen answers, 30% wrong +\d"]),
    "onpolicy": (
        ["--cache"],
        [
            r"^off-policy: sft +whole +\d",
            r"^on-policy: sft, then jsd, half of the texts +whole",
            r"s of processor time$",
        ],
    ),
    "endtoend": (
        ["--folder"],
        [r"^trl .* bits/byte", r"^rayfuse .* bits/byte", r"^rayfuse .* TRL over rayfuse: total"],
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_bench_script_runs(script, tmp_path):
    options, lines = SCRIPTS[script]
    command = [sys.executable, str(ROOT / "jobs" / "bench" / f"{script}.py"), "--quick", *options]
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    done = subprocess.run(
        command + [str(tmp_path / "folder")] * len(options),
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=540,
    )
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
    for line in lines:
        assert re.search(line, done.stdout, re.MULTILINE), f"no line matches {line!r} in:\n{done.stdout}"
