import json
import math
import re
from html.parser import HTMLParser
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from rayfuse.config import STAGES, config_json, parse_config
from rayfuse.report.charts import Curve, curve_panel, window
from rayfuse.report.page import duration, result_table, write_report
from rayfuse.report.results import Score, best, columns, difference, headline

VOID = {"meta", "br", "link", "img"}


class Balanced(HTMLParser):
    """Collects tags that are left open or closed without having been opened, attributes, and the text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.faults: list[str] = []
        self.text = ""
        self.attributes: list[tuple[str, str | None]] = []
        self.feed(page)
        self.close()
        self.faults += self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.faults.append(f"/{tag}")

    def handle_data(self, data: str) -> None:
        self.text += data


def wilson(right: int, total: int) -> tuple[float, float]:
    z, p = 1.959964, right / total
    middle = (p + z * z / (2 * total)) / (1 + z * z / total)
    half = z / (1 + z * z / total) * math.sqrt(p * (1 - p) / total + z * z / (4 * total * total))
    return max(0.0, middle - half), min(1.0, middle + half)


def model(name: str, role: str, right: dict[str, int], bits: float, total: int = 200) -> dict[str, Any]:
    """An evaluation as results.json holds it."""
    counts = {skill: (n, total) for skill, n in right.items()}
    if counts:
        counts["all"] = (sum(right.values()), total * len(right))
    accuracy = {
        skill: {"right": n, "total": of, "share": n / of, "interval": wilson(n, of)}
        for skill, (n, of) in counts.items()
    }
    interval = [bits - 0.01, bits + 0.01]
    return {"name": name, "role": role, "bits_per_byte": bits, "bits_per_byte_interval": interval, "accuracy": accuracy}


def evaluated(fused: dict[str, int], teacher: str = "math-expert") -> list[dict[str, Any]]:
    return [
        model(teacher, "teacher", {"math": 184, "words": 9}, 1.31),
        model("pivot", "pivot", {"math": 38, "words": 44}, 0.91),
        model("sft", "stage", {"math": 92, "words": 110}, 0.61),
        model("infifusion", "stage", fused, 0.55),
    ]


BETTER = {"math": 130, "words": 108}
SAME = {"math": 94, "words": 112}
WORSE = {"math": 40, "words": 60}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A finished run's folder, without the models."""
    output = tmp_path / "my <run>"
    output.mkdir()
    config = parse_config(
        {
            "student": "org/pivot",
            "teachers": ["org/math-expert"],
            "data": "train.jsonl",
            "stages": ["sft", "infifusion"],
            "output": str(output),
        }
    )
    (output / "config.json").write_text(config_json(config))
    write_metrics(output, "math-expert")
    write_results(output, evaluated(BETTER))
    return output


def write_results(output: Path, models: list[dict[str, Any]], first_bad: str = "line 17: no messages") -> None:
    data = {"rows": 12040, "bad_rows": 3, "samples": 11987, "too_long": 53, "cut": 7, "first_bad": first_bad}
    times = {"read data": 10.0, "01-sft": 30.0, "02-infifusion": 60.0}
    (output / "results.json").write_text(json.dumps({"data": data, "models": models, "times": times}))


def write_metrics(output: Path, teacher: str) -> None:
    """Ten steps of SFT, twenty with a teacher: asked in the first five, from the store then."""
    with (output / "metrics.jsonl").open("w") as file:
        for stage, steps in (("01-sft", 10), ("02-infifusion", 20)):
            for step in range(1, steps + 1):
                record = {"stage": stage, "step": step, "steps": steps, "loss": 3 / step, "loss_sft": 3 / step}
                record |= {"cut": 0, "damaged": 0, "tokens": 1000 if step % 2 else 3000, "seconds": 2.0}
                record |= {"tokens_per_second": 500.0, "wait_share": 0.5 if step <= 5 else 0.0, "time": 1.0}
                if stage == "02-infifusion":
                    record[f"loss_uld/{teacher}"] = 2.0 + 1 / step
                    record[f"aligned_share/{teacher}"] = 0.8 if step % 2 else 0.6
                    record[f"forwarded/{teacher}"] = 64 if step <= 5 else 0
                    record[f"stored/{teacher}"] = 0 if step <= 5 else 64
                file.write(json.dumps(record) + "\n")


def test_the_page_holds_the_runs_numbers(folder: Path) -> None:
    path = write_report(folder)
    assert path == folder / "report.html"
    page = Balanced(path.read_text())
    assert page.faults == []
    text = " ".join(page.text.split())
    assert "infifusion answers 60% of 400 held-out items; sft alone 50%, the pivot 20%" in text
    assert "65.0%58.2–71.3" in text  # 130 of 200
    assert "0.5500.540–0.560" in text
    # aligned share: weighted with tokens, (0.8 * 1000 + 0.6 * 3000) / 4000
    assert "65.0% of 40,000 tokens" in text
    assert "320 asked, 960 from the store" in text
    assert "read data 10.0 s (10%)" in text
    assert "1:40 min in all" in text
    assert "25% of 20.0 s waiting" in text  # five of ten steps at one half
    assert "malformed rows, skipped3the first: line 17: no messages" in text
    assert '"learning_rate": 1e-05' in text


@pytest.mark.parametrize("method", [name for name, kind in STAGES.items() if kind.uses_teachers])
def test_everything_that_a_method_measures_has_its_panel(folder: Path, method: str) -> None:
    parts = STAGES[method].parts
    with (folder / "metrics.jsonl").open("w") as file:
        for step in (1, 2):
            keys = [metric.key(name) for metric in parts for name in ("math", "code")]
            values = {key: 1.5 + index for index, key in enumerate(dict.fromkeys(keys))}
            record = {"stage": f"02-{method}", "step": step, "steps": 2, "loss": 0.75, "tokens": 100, "seconds": 2.0}
            file.write(json.dumps({**record, "wait_share": 0.0, **values}) + "\n")
    page = Balanced(write_report(folder).read_text())
    assert page.faults == []
    assert "total = sft part" not in page.text
    for metric in parts:
        assert metric.shown == "loss"
        assert metric.title in page.text
        assert metric.unit in page.text
    last = len({metric.key(name) for metric in parts for name in ("math", "code")}) - 1
    assert f"{1.5 + last:g}" in page.text


def test_a_distance_is_drawn_whatever_the_method_calls_it(folder: Path) -> None:
    """Where a stage's name tells no method, or one that has no such part."""
    metrics = folder / "metrics.jsonl"
    metrics.write_text(metrics.read_text().replace("loss_uld/", "loss_mse/").replace("02-infifusion", "02-other"))
    page = Balanced(write_report(folder).read_text())
    assert "distance to each teacher" in page.text
    assert "mean square over shared tokens" in page.text
    assert "2.05" in page.text  # 2 + 1/20, the curve's end


def test_how_strongly_a_distance_pulls_is_said_under_its_curves(folder: Path) -> None:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    first = json.loads(lines[10])
    assert first["stage"] == "02-infifusion"
    lines[10] = json.dumps({**first, "distance_ratio": 6.444, "lam": 0.03})
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    page = Balanced(write_report(folder).read_text())
    assert page.faults == []
    said = (
        "the gradient of the distance was 6.4 times that of SFT; with lam 0.03 the distance pulls 0.2 times as strongly"
    )
    assert page.text.count(said) == 1


def test_one_panel_where_the_loss_is_its_sft_part_and_two_where_it_is_not(folder: Path) -> None:
    assert Balanced(write_report(folder).read_text()).text.count("total = sft part") == 1  # 01-sft
    metrics = folder / "metrics.jsonl"
    metrics.write_text(metrics.read_text().replace('"loss": 3.0', '"loss": 3.1'))
    page = Balanced(write_report(folder).read_text()).text
    assert "total = sft part" not in page
    assert page.count("sft part") == 2


def test_the_best_of_pivot_and_stages_is_marked(folder: Path) -> None:
    page = write_report(folder).read_text()
    marked = re.findall(r'<td class="best">([^<]+)<', page)
    assert marked == ["55.0%", "65.0%", "59.5%", "0.550"]  # words by sft; math, all and bits per byte by infifusion
    assert "92.0%" in page  # the teacher's, higher, is not a competitor


def test_nothing_is_loaded_and_nothing_runs(folder: Path) -> None:
    page = write_report(folder).read_text()
    assert "<script" not in page
    assert not re.search(r"(src|href|srcset|action)\s*=|url\(|@import|https?://", page)
    assert not [name for name, _ in Balanced(page).attributes if name.startswith("on")]


@pytest.mark.parametrize("hostile", ['<script>alert("1")</script>', "a\"b'c&<img src=http://x.example/y>", "[red]x[/]"])
def test_names_and_reasons_from_outside_stay_text(folder: Path, hostile: str) -> None:
    write_results(folder, evaluated(BETTER, teacher=hostile), first_bad=hostile)
    write_metrics(folder, hostile)
    page = write_report(folder).read_text()
    assert "<script" not in page
    assert "<img" not in page
    parsed = Balanced(page)
    assert parsed.faults == []
    # Result table, asked, aligned, curve, dot chart, reason: it is shown where it belongs, as it is.
    assert parsed.text.count(hostile) >= 6
    out = StringIO()
    Console(file=out, width=200).print(result_table({"models": evaluated(BETTER, teacher=hostile)}))
    assert f"{hostile} (teacher)" in out.getvalue()


@pytest.mark.parametrize(
    "missing", [("results.json",), ("metrics.jsonl",), ("config.json",), ("results.json", "metrics.jsonl")]
)
def test_missing_pieces_leave_their_section_out(folder: Path, missing: tuple[str, ...]) -> None:
    for name in missing:
        (folder / name).unlink()
    page = Balanced(write_report(folder).read_text())
    assert page.faults == []
    assert ("Result\n" in page.text) == ("results.json" not in missing)
    assert ("Loss\n" in page.text) == ("metrics.jsonl" not in missing)
    assert ("Configuration\n" in page.text) == ("config.json" not in missing)
    if missing == ("results.json",):
        assert "Nothing was evaluated. Trained: 01-sft 10 of 10 steps, 02-infifusion 20 of 20 steps." in page.text


def test_without_generated_answers_bits_per_byte_are_shown(folder: Path) -> None:
    models = [model("pivot", "pivot", {}, 0.9), model("infifusion", "stage", {}, 0.7)]
    write_results(folder, models)
    page = write_report(folder).read_text()
    assert "infifusion needs 0.700 bits per byte of the held-out responses (less is better); the pivot 0.900." in page
    assert "infifusion is better than the pivot: the difference is -0.200 bits per byte" in page
    assert "Accuracy" not in page


def test_wording_where_fusion_is_better() -> None:
    first, second = headline(evaluated(BETTER))
    assert first.startswith("infifusion answers 60% of 400 held-out items; sft alone 50%, the pivot 20%")
    assert second.startswith("infifusion is better than sft alone: the difference is +9.0 points (95% interval +2.1 to")


def test_wording_where_the_difference_may_be_chance() -> None:
    _, second = headline(evaluated(SAME))
    assert second.startswith(
        "This does not show that infifusion is better than sft alone: the difference is +1.0 points"
    )
    assert second.endswith("zero included).")


def test_wording_where_fusion_is_worse() -> None:
    _, second = headline(evaluated(WORSE))
    assert second.startswith("infifusion is worse than sft alone: the difference is -25.5 points")


def test_rounding_never_makes_different_shares_look_equal() -> None:
    models = evaluated({"math": 91, "words": 110})
    assert "answers 50.2% of 400 held-out items; sft alone 50.5%" in headline(models)[0]


def test_difference_is_newcombes() -> None:
    # Newcombe (1998), example (a): 56/70 against 48/80 gives 0.0524 to 0.3339 by method 10.
    one, other = (Score(n / of, *wilson(n, of), True) for n, of in ((56, 70), (48, 80)))
    gap = difference(one, other)
    assert (gap.value, gap.low, gap.high) == pytest.approx((0.2, 0.0524, 0.3339), abs=5e-5)


def test_columns_and_best() -> None:
    models = evaluated(SAME)
    assert columns(models) == ["math", "words", "all", "bits per byte"]
    assert columns([model("pivot", "pivot", {"all items": 3}, 1.0)]) == ["all", "bits per byte"]
    assert best(models, "bits per byte") == {"infifusion"}
    assert best([*models, model("again", "stage", SAME, 0.7)], "math") == {"infifusion", "again"}
    assert best(models[:2], "math") == set()  # nobody to be better than


def test_terminal_table_fits_eighty_columns() -> None:
    out = StringIO()
    Console(file=out, width=80).print(result_table({"models": evaluated(BETTER)}))
    assert "59.5%" in out.getvalue()
    assert "58.2–71.3" in out.getvalue()


def test_curves_leave_out_what_is_not_finite_and_stay_small() -> None:
    values = [math.nan if i % 10 == 0 else 5.0 for i in range(50_000)]
    panel = curve_panel("loss", "nats", [Curve("total", "red", range(1, 50_001), values)])
    assert "nan" not in panel
    assert "<b>5</b>" in panel  # the mean at the end
    assert len(panel) < 30_000
    assert curve_panel("loss", "nats", [Curve("total", "red", [1], [math.inf])]) == ""
    assert "<circle" in curve_panel("loss", "nats", [Curve("total", "red", [1], [0.0])])


def test_window_is_odd() -> None:
    assert [window(n) for n in (1, 49, 75, 500)] == [1, 1, 3, 21]


def test_duration() -> None:
    assert [duration(s) for s in (3.21, 59.97, 245, 8100)] == ["3.2 s", "1:00 min", "4:05 min", "2:15 h"]
