"""What is printed: a terminal that is not UTF-8, a reader that has left, and the encoding of rayfuse's own files."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "ascii"}
POSIX = {"LC_ALL": "POSIX", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
LATIN = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONIOENCODING": "latin-1"}


def program(code, environment, **options):
    """Run Python code as a program of its own, with pipes for its output."""
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(("LC_", "LANG", "PYTHONIO"))}
    inherited["PYTHONPATH"] = str(ROOT)
    command = [sys.executable, *(code if isinstance(code, list) else ["-c", code])]
    return subprocess.run(command, env=inherited | environment, capture_output=True, timeout=300, **options)


RESULTS = """
import json, pathlib, sys
from rayfuse.cli import errors_shown, show_results
from rayfuse.report.terminal import make_console
with errors_shown():
    show_results(pathlib.Path(sys.argv[1]), make_console())
"""


@pytest.fixture
def finished(tmp_path):
    """The folder of a finished run whose models have names that no ASCII terminal can show."""
    accuracy = {"all": {"right": 1, "total": 3, "share": 1 / 3, "interval": [0.1, 0.7]}}
    models = [
        {"name": name, "role": role, "bits_per_byte": 1.5, "bits_per_byte_interval": [1.0, 2.0], "accuracy": accuracy}
        for name, role in (("Mathe–Größe 数学", "teacher"), ("pivot", "pivot"), ("infifusion", "stage"))
    ]
    (tmp_path / "results.json").write_text(json.dumps({"models": models}), encoding="utf-8")
    return tmp_path


@pytest.mark.parametrize("environment", [ASCII, POSIX, LATIN], ids=["ascii", "posix", "latin-1"])
def test_the_result_table_is_printed_on_any_terminal(finished, environment):
    done = program(["-c", RESULTS, str(finished)], environment)
    assert done.returncode == 0, done.stderr.decode()
    shown = done.stdout.decode("latin-1")
    assert "infifusion" in shown
    assert "33.3%" in shown
    assert r"\u6570\u5b66" in shown  # the name is spelt out, not lost
    if environment is not LATIN:
        assert shown.isascii()
        assert "bits/byte v" in shown


def test_the_result_table_keeps_its_signs_on_a_utf_8_terminal(finished):
    done = program(["-c", RESULTS, str(finished)], {"LC_ALL": "C.UTF-8"})
    shown = done.stdout.decode("utf-8")
    assert "数学" in shown
    assert "bits/byte ↓" in shown
    assert "─" in shown


@pytest.mark.parametrize("arguments", [["--help"], ["check", "--help"], ["inspect", "align", "--help"]])
def test_help_is_printed_in_ascii(arguments):
    done = program(["-m", "rayfuse.cli", *arguments], ASCII)
    assert done.returncode == 0, done.stderr.decode()
    assert b"Usage" in done.stdout
    assert done.stdout.isascii()


def _world(tmp_path, tiny, output="runs"):
    config = tiny.tree(tmp_path / output)
    path = tmp_path / "run.json"
    path.write_text(json.dumps(config, ensure_ascii=False), encoding="utf-8")
    return path


def test_check_says_what_it_has_to_say_in_ascii(tiny, tmp_path):
    done = program(["-m", "rayfuse.cli", "check", str(_world(tmp_path, tiny))], ASCII)
    assert done.returncode == 0, done.stderr.decode()
    assert done.stdout.isascii()


def test_a_folder_that_the_locale_cannot_name_is_one_message(tiny, tmp_path):
    done = program(["-m", "rayfuse.cli", "check", str(_world(tmp_path, tiny, "Läufe"))], ASCII)
    assert done.returncode == 1
    assert b"Traceback" not in done.stderr
    assert b"names files in ascii" in done.stderr
    assert b"PYTHONUTF8=1" in done.stderr
    assert program(["-m", "rayfuse.cli", "check", str(tmp_path / "run.json")], {"LC_ALL": "C"}).returncode == 0


def test_inspection_spells_out_what_a_terminal_cannot_show(tiny, tmp_path):
    arguments = ["inspect", "align", str(_world(tmp_path, tiny)), "--text", "12 Äpfel – 世界"]
    done = program(["-m", "rayfuse.cli", *arguments], {**ASCII, "PYTHONUTF8": "0"})
    assert done.returncode == 0, done.stderr.decode()
    assert done.stdout.isascii()
    assert rb"\xe4" in done.stdout  # a byte of a character, as each tokenizer has it


@pytest.mark.parametrize("start", [["-m", "rayfuse.cli", "fuse"], ["jobs/fuse.py"]], ids=["rayfuse", "job"])
def test_an_error_about_text_that_is_not_ascii_is_one_message(tmp_path, start):
    (tmp_path / "Lauf.yaml").write_text("größe: 1\n", encoding="utf-8")
    done = program([*start, str(tmp_path / "Lauf.yaml")], ASCII, cwd=ROOT)
    assert done.returncode == 1
    assert done.stderr.startswith(b"ConfigError: ")
    assert b"Traceback" not in done.stderr
    assert rb"gr\xf6\xdfe" in done.stderr


def test_a_warning_through_logging_is_printed(tmp_path):
    code = "import logging; from rayfuse.cli import errors_shown\n" + (
        r"with errors_shown(): logging.getLogger('rayfuse').warning('\u6570\u5b66'); print('\u2013 \u6570\u5b66')"
    )
    done = program(code, ASCII)
    assert done.returncode == 0
    assert rb"\u6570\u5b66" in done.stderr
    assert b"Traceback" not in done.stderr
    assert done.stdout == rb"- \u6570\u5b66" + b"\n"


def test_a_path_that_is_no_text_at_all_can_be_printed():
    """A file name of other bytes than UTF-8 reaches Python as lone surrogates, which no encoding has."""
    code = "from rayfuse.report.terminal import make_console; make_console().print('/data/\\udce4')"
    done = program(code, {"LC_ALL": "C.UTF-8"})
    assert done.returncode == 0, done.stderr.decode()
    assert done.stdout == rb"/data/\udce4" + b"\n"


def test_a_reader_that_has_left_does_not_end_the_run(tmp_path):
    code = f"""
from pathlib import Path
from rayfuse.report.terminal import make_console
console = make_console()
for line in range(100_000):
    console.print("line", line)
Path({str(tmp_path / "end")!r}).write_text("reached", encoding="utf-8")
"""
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", f'"{sys.executable}" -c "$CODE" | head -n 1'],
        env={**os.environ, "PYTHONPATH": str(ROOT), "CODE": code},
        capture_output=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr.decode()
    assert (tmp_path / "end").read_text(encoding="utf-8") == "reached"


# --- files ------------------------------


def _without_encoding(path):
    """Lines of a source file that open a text file in whatever encoding the machine has."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Call):
            continue
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        given = {keyword.arg: keyword.value for keyword in node.keywords}
        if name in ("run", "Popen", "check_output") and ("text" in given or "universal_newlines" in given):
            yield f"{path}:{node.lineno}: {name}(text=True)"
        text = name in ("read_text", "write_text")
        if name == "open" and isinstance(node.func, ast.Name):
            mode = given.get("mode", node.args[1] if len(node.args) > 1 else ast.Constant("r"))
            text = isinstance(mode, ast.Constant) and "b" not in str(mode.value)
        positional = len(node.args) > {"read_text": 0, "write_text": 1, "open": 3}.get(name, 99)
        if text and "encoding" not in given and not positional:
            yield f"{path}:{node.lineno}: {name}"


def test_every_text_file_is_opened_with_an_encoding():
    found = [
        line
        for folder in ("rayfuse", "jobs")
        for path in (ROOT / folder).rglob("*.py")
        for line in _without_encoding(path)
    ]
    assert not found


def test_that_a_missing_encoding_is_found(tmp_path):
    lines = ["open('a')", "open('a', 'w')", "Path('a').read_text()", "p.write_text('x')", "run(['a'], text=True)"]
    good = ["open('a', 'rb')", "open('a', encoding='utf-8')", "p.read_text(encoding='utf-8')", "p.read_text('utf-8')"]
    (tmp_path / "a.py").write_text("\n".join([*lines, *good]), encoding="utf-8")
    assert len(list(_without_encoding(tmp_path / "a.py"))) == len(lines)


def test_data_are_read_as_utf_8_whatever_the_locale(tmp_path):
    row = {"prompt": "größe?", "response": "数学 – 1"}
    (tmp_path / "data.jsonl").write_text(json.dumps(row, ensure_ascii=False) + "\n", encoding="utf-8")
    code = """
import sys
from rayfuse.config import Data
from rayfuse.data.rows import read_samples
print(ascii(read_samples(Data(path=sys.argv[1]))[0][0].response))
"""
    done = program(["-c", code, str(tmp_path / "data.jsonl")], POSIX)
    assert done.returncode == 0, done.stderr.decode()
    assert done.stdout.decode().strip() == ascii("数学 – 1")
