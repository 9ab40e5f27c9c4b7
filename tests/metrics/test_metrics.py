"""metrics.jsonl: written by several processes at once, read while it grows, and after its writers were killed."""

import json
import subprocess
import sys
from io import StringIO

from rich.console import Console

from rayfuse.metrics.live import LiveLine
from rayfuse.metrics.records import MetricsWriter, read_metrics

WRITER = """
import sys
from pathlib import Path
from rayfuse.metrics.records import MetricsWriter
path, name = Path(sys.argv[1]), sys.argv[2]
writer = MetricsWriter(path)
for step in range(1, 201):
    writer.write({"stage": name, "step": step, "text": name * 20_000})
"""


def test_writers_in_other_processes_lose_no_record_and_tear_no_line(tmp_path):
    """Three processes, 200 lines of 20 kB each: more than any buffer or pipe writes at once."""
    path = tmp_path / "metrics.jsonl"
    writers = [subprocess.Popen([sys.executable, "-c", WRITER, str(path), name]) for name in "abc"]
    assert [writer.wait(timeout=120) for writer in writers] == [0, 0, 0]
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert all(record["text"] == record["stage"] * 20_000 for record in records)
    for name in "abc":
        assert [record["step"] for record in records if record["stage"] == name] == list(range(1, 201))


def test_the_line_of_a_killed_writer_costs_no_other_record(tmp_path):
    path = tmp_path / "metrics.jsonl"
    one, other = MetricsWriter(path), MetricsWriter(path)
    one.write({"stage": "a", "step": 1})
    with path.open("a") as file:
        file.write('{"stage": "b", "st')
    other.write({"stage": "c", "step": 1})
    one.write({"stage": "a", "step": 2})
    assert [(record["stage"], record["step"]) for record in read_metrics(path)] == [("a", 1), ("c", 1), ("a", 2)]


def test_a_step_done_again_counts_once(tmp_path):
    writer = MetricsWriter(tmp_path / "metrics.jsonl")
    for step, loss in ((1, 3.0), (2, 2.0), (1, 3.5), (2, 2.5)):
        writer.write({"stage": "a", "step": step, "loss": loss})
    assert [record["loss"] for record in read_metrics(tmp_path / "metrics.jsonl")] == [3.5, 2.5]


def test_steps_repeated_after_a_resume_stand_once_in_what_readers_get(tmp_path):
    """Killed at step 4, resumed from the checkpoint of step 2; another stage and another student are apart."""
    path = tmp_path / "metrics.jsonl"
    for attempt, steps in (("first", (1, 2, 3, 4)), ("resumed", (3, 4, 5))):
        writer = MetricsWriter(path)
        for step in steps:
            for stage in ("01-sft", "02-infifusion/math"):
                writer.write({"stage": stage, "step": step, "by": attempt})
    records = read_metrics(path)
    steps = [(record["stage"], record["step"]) for record in records]
    assert sorted(steps) == [(stage, step) for stage in ("01-sft", "02-infifusion/math") for step in range(1, 6)]
    assert all(record["by"] == ("resumed" if record["step"] > 2 else "first") for record in records)


def test_lines_that_are_no_records_cost_nothing(tmp_path):
    path = tmp_path / "metrics.jsonl"
    MetricsWriter(path).write({"stage": "a", "step": 1})
    with path.open("ab") as file:
        file.write(b'[1]\n3\n"text"\n\xff\xfe\n{"step": 2}\n\n')
    MetricsWriter(path).write({"stage": "a", "step": 2})
    assert [record["step"] for record in read_metrics(path)] == [1, 2]
    with path.open("ab") as file:
        file.write(b"[1]\n")
    LiveLine(path, Console(file=StringIO()))._show()


def test_the_live_line_counts_each_student_by_itself(tmp_path, monkeypatch):
    """Two students write in turns, one ten times as fast: each has its own time left."""
    path, out = tmp_path / "metrics.jsonl", StringIO()
    writer = MetricsWriter(path)
    line = LiveLine(path, Console(file=out, width=200, force_terminal=True))
    for second, stage, step in ((0, "math", 1), (0, "code", 1), (10, "math", 2), (10, "code", 11)):
        monkeypatch.setattr("rayfuse.metrics.live.time.monotonic", lambda second=second: second)
        writer.write({"stage": stage, "step": step, "steps": 21, "loss": 1, "tokens_per_second": 1, "wait_share": 0})
        line._show()
    assert "math  step 2/21" in out.getvalue()
    assert "ETA 3:10" in out.getvalue()  # 19 steps of 10 s
    assert "ETA 0:10" in out.getvalue()  # 10 steps of 1 s
