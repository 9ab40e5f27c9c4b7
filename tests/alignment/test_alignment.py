"""Alignment on real tokenizers of four families, against TRL's walk over byte offsets."""

import base64
import itertools
import pickle
import unicodedata

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from jobs.smollm2_world import QWEN_PATTERN, QWEN_SPECIAL, package_file
from rayfuse.alignment.pairs import align, align_by_position
from rayfuse.alignment.token_bytes import byte_ends, encode_response, token_bytes
from rayfuse.errors import AlignmentError
from tests.real_tokenizers import FAMILIES, SENTENCEPIECE, TEKKEN, qwen, sentencepiece_mistral, smollm2, tekken

PIECES = (
    *(
        "the",
        " the",
        " ",
        "  ",
        "    ",
        "\n",
        "\r\n",
        "\t",
        "2024",
        "1",
        ",",
        "def f(x):",
        "_",
        "é",
        "e\u0301",
        "ß",
        "𝔘",
    ),
    *("日本語", "中文，", "한국어", "ไทย", "العربية", "ạ\u0308", "\u200d", "\u00a0", "👨‍👩‍👧‍👦", "🏳️‍🌈", "😀"),
    *("<|im_end|>", "<s>", "[INST]", "<0x0A>"),
)
# Latin-1 to the basic plane, without surrogates; the planes above through PIECES (SmolLM2 lacks some of their bytes).
CHARACTERS = st.characters(codec="utf-8", min_codepoint=32, max_codepoint=0xFFFD)
TEXTS = st.lists(st.sampled_from(PIECES) | st.text(CHARACTERS, max_size=4))
SETTINGS = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
SAMPLES = (
    "Hello, world!\n",
    "naïve café 👨‍👩‍👧",
    "  x = 12345 + 6.7  # 中文\r\n\r\n",
    "\tif a:\n\t\treturn  b",
    "'ll we'LL  ...",
)


def texts() -> st.SearchStrategy[str]:
    """Random texts that the four tokenizers can write: NFC, no U+2581, no byte that SmolLM2 does not have."""
    lacking = set(range(256)) - {piece[0] for piece in token_bytes(smollm2()) if len(piece) == 1}

    def writable(text: str) -> bool:
        return unicodedata.is_normalized("NFC", text) and "▁" not in text and not lacking & set(text.encode())

    return TEXTS.map(lambda pieces: unicodedata.normalize("NFC", "".join(pieces))).filter(writable)


@pytest.fixture(scope="session")
def trl_walk():
    from trl.experimental.gold.gold_trainer import ULDLoss

    return ULDLoss._align_by_byte_offsets


def spans(ends: np.ndarray) -> list[tuple[int, int]]:
    offsets = [0, *ends.tolist()]
    return list(itertools.pairwise(offsets))


def without_dummy(family: str, text: str, read: bytes) -> bytes:
    dummy = family == "sentencepiece" and text and not text.startswith(" ")
    return read[1:] if dummy else read


@pytest.mark.parametrize("family", FAMILIES)
@SETTINGS
@given(data=st.data())
def test_the_tokens_of_a_text_hold_its_bytes(family, data):
    tokenizer, text = FAMILIES[family](), data.draw(texts())
    ids, ends = encode_response(tokenizer, text)
    pieces = token_bytes(tokenizer)
    read = [pieces[i] for i in ids]
    assert without_dummy(family, text, b"".join(read)) == text.encode()
    lengths = np.array([len(piece) for piece in read], dtype=np.int64)
    if len(lengths) and without_dummy(family, text, b"x") == b"":
        lengths[0] -= 1
    assert ends.dtype == np.int64
    np.testing.assert_array_equal(ends, np.cumsum(lengths))
    if family != "sentencepiece" or not text.startswith(" "):
        np.testing.assert_array_equal(byte_ends(tokenizer, ids), ends)


@pytest.mark.parametrize(
    ("student", "teacher"),
    [("smollm2", "qwen"), ("qwen", "tekken"), ("tekken", "sentencepiece"), ("sentencepiece", "smollm2")],
)
@SETTINGS
@given(data=st.data())
def test_the_aligned_rows_are_all_common_boundaries_and_equal_trl(student, teacher, data, trl_walk):
    text = data.draw(texts())
    student_ends, teacher_ends = (encode_response(FAMILIES[name](), text)[1] for name in (student, teacher))
    aligned = align(student_ends, teacher_ends)
    student_offsets, teacher_offsets = np.append(0, student_ends), np.append(0, teacher_ends)
    shared = student_offsets[aligned.student]
    np.testing.assert_array_equal(shared, teacher_offsets[aligned.teacher])
    assert shared.tolist() == sorted(set(student_offsets.tolist()) & set(teacher_offsets.tolist()))
    assert (aligned.student[-1], aligned.teacher[-1]) == (len(student_ends), len(teacher_ends))

    student_groups, teacher_groups = trl_walk(spans(student_ends), spans(teacher_ends))
    assert aligned.student.tolist() == [0, *(group[-1] + 1 for group in student_groups)]
    assert aligned.teacher.tolist() == [0, *(group[-1] + 1 for group in teacher_groups)]


@given(st.lists(st.integers(0, 3), max_size=12), st.lists(st.integers(0, 3), max_size=12))
def test_of_rows_that_have_read_equally_much_the_last_pairs_but_at_the_start_the_first(widths, other_widths):
    gap = sum(widths) - sum(other_widths)
    widths, other_widths = [*widths, max(0, -gap)], [*other_widths, max(0, gap)]
    offsets, other = np.cumsum([0, *widths]).tolist(), np.cumsum([0, *other_widths]).tolist()
    naive = [(0, 0)]
    for byte in sorted(set(offsets) & set(other) - {0}):
        naive.append((len(offsets) - 1 - offsets[::-1].index(byte), len(other) - 1 - other[::-1].index(byte)))
    aligned = align(np.array(offsets[1:]), np.array(other[1:]))
    assert list(zip(aligned.student.tolist(), aligned.teacher.tolist(), strict=True)) == naive


def test_a_hand_made_pair():
    aligned = align(np.array([3, 4, 9]), np.array([1, 3, 5, 9]))
    assert aligned.student.tolist() == [0, 1, 3]
    assert aligned.teacher.tolist() == [0, 2, 4]


def test_an_empty_response_has_one_pair():
    assert align(np.array([], dtype=np.int64), np.array([])).student.tolist() == [0]
    for load in FAMILIES.values():
        ids, ends = encode_response(load(), "")
        assert ids.dtype == ends.dtype == np.int64
        assert len(ids) == len(ends) == 0


def test_texts_of_different_length_do_not_align():
    with pytest.raises(AlignmentError, match="student read 4 bytes and the teacher 5"):
        align(np.array([2, 4]), np.array([5]))


@pytest.mark.parametrize("ends", [[3, 2, 4], [-1, 4], [0.5, 4.0], [[1, 2], [3, 4]]])
def test_byte_ends_that_cannot_be_are_refused(ends):
    with pytest.raises(AlignmentError, match="the teacher's byte ends"):
        align(np.array([2, 4]), np.array(ends))


def test_alignment_by_position_is_cut_at_the_shorter():
    aligned = align_by_position(2, 5)
    assert aligned.student.tolist() == aligned.teacher.tolist() == [0, 1, 2]
    with pytest.raises(AlignmentError, match="-1 tokens"):
        align_by_position(3, -1)


@pytest.mark.parametrize(("text", "ends"), [("foo", [3]), (" foo", [4]), ("  foo", [2, 5]), ("\n", [0, 1])])
def test_a_dummy_space_has_no_width_and_a_real_one_has(text, ends):
    assert encode_response(sentencepiece_mistral(), text)[1].tolist() == ends


def test_ids_alone_stand_for_what_the_tokenizer_decodes():
    tokenizer = sentencepiece_mistral()
    ids, _ = encode_response(tokenizer, " foo")
    assert tokenizer.decode(ids) == "foo"
    assert byte_ends(tokenizer, ids).tolist() == [3]
    assert byte_ends(tokenizer, [tokenizer.bos_token_id, *ids, tokenizer.eos_token_id]).tolist() == [0, 3, 3]


@pytest.mark.parametrize("family", FAMILIES)
def test_special_tokens_have_no_width_and_are_never_made_from_text(family):
    tokenizer = FAMILIES[family]()
    added = tokenizer.added_tokens_decoder
    special = {i for i, token in added.items() if token.special}
    assert byte_ends(tokenizer, [tokenizer.eos_token_id]).tolist() == [0]
    assert all(token_bytes(tokenizer)[i] == b"" for i in special)
    for name in [*(added[i].content for i in sorted(special)[:16]), *QWEN_SPECIAL, "<s>", "</s>", "[INST]"]:
        ids, ends = encode_response(tokenizer, f"a {name} b{name}")
        assert ends[-1] == len(f"a {name} b{name}")
        assert not special & set(ids.tolist())


def test_an_added_token_that_is_not_special_reads_its_text():
    ids, ends = encode_response(sentencepiece_mistral(), "[REFERENCE_DOC_0] a")
    assert ids[0] in sentencepiece_mistral().all_special_ids  # that list holds every added token
    assert ends.tolist() == [17, 19]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("outside", [-100, 10**6])
def test_an_id_outside_the_vocabulary_is_named(family, outside):
    with pytest.raises(AlignmentError, match=f"token id {outside} is outside the vocabulary"):
        byte_ends(FAMILIES[family](), [5, outside])


@pytest.mark.parametrize("ids", [[0.5], [[1, 2]]])
def test_ids_must_be_one_list_of_integers(ids):
    with pytest.raises(AlignmentError, match="token ids must be integers"):
        byte_ends(qwen(), ids)


def test_a_text_that_the_tokenizer_changes_is_refused():
    with pytest.raises(AlignmentError, match=r"normalize\('NFC', text\)"):
        encode_response(qwen(), "cafe\u0301")
    with pytest.raises(AlignmentError, match="NFC"):  # as many bytes as before, but other ones
        encode_response(qwen(), "\u0374")
    with pytest.raises(AlignmentError, match="cannot tell '▁' from a space"):
        encode_response(sentencepiece_mistral(), "a ▁ b")
    with pytest.raises(AlignmentError, match=r"at byte 1 its tokens hold b'b' where the text has b'\\x04b'"):
        encode_response(smollm2(), "a\x04b")
    with pytest.raises(AlignmentError, match="not valid Unicode"):
        encode_response(tekken(), "\ud800")


def test_errors_pickle():
    with pytest.raises(AlignmentError) as caught:
        align(np.array([1]), np.array([2]))
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


def fast(model, *, normalizer=None, pre_tokenizer=None, decoder=None, **options) -> PreTrainedTokenizerFast:
    backend = Tokenizer(model)
    backend.normalizer = normalizer
    backend.pre_tokenizer = pre_tokenizer
    backend.decoder = decoder
    return PreTrainedTokenizerFast(tokenizer_object=backend, **options)


def metaspace(model, **options) -> PreTrainedTokenizerFast:
    decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return fast(model, decoder=decoder, **options)


LETTERS = {"▁": 0, "a": 1, "b": 2, "▁a": 3}


@pytest.mark.parametrize(
    ("setting", "text", "ends"),
    [
        ("prepend", "a b", [1, 2, 3]),
        ("prepend", " a", [0, 2]),  # a dummy space is put before a real one
        ("always", "a b", [1, 2, 3]),
        ("always", " a", [2]),  # none before a real one
        ("first", " a", [2]),
        ("never", "a", [1]),
        ("never", " a", [2]),
    ],
)
def test_every_way_of_putting_a_dummy_space(setting, text, ends):
    model = models.BPE(LETTERS, [("▁", "a")])
    replace = normalizers.Replace(" ", "▁")
    if setting == "prepend":
        tokenizer = metaspace(model, normalizer=normalizers.Sequence([normalizers.Prepend("▁"), replace]))
    else:
        tokenizer = metaspace(model, pre_tokenizer=pre_tokenizers.Metaspace(prepend_scheme=setting, split=False))
    assert encode_response(tokenizer, text)[1].tolist() == ends


def test_an_added_token_has_the_width_of_its_content_and_a_dummy_space_follows_it():
    prepend = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer = metaspace(models.BPE(LETTERS, [("▁", "a")]), normalizer=prepend)
    token_bytes(tokenizer)  # the table is made anew when tokens are added
    tokenizer.add_tokens([AddedToken("<tool_call>", normalized=False)])
    assert encode_response(tokenizer, "a<tool_call>a b")[1].tolist() == [1, 12, 13, 14, 15]


def test_a_byte_level_tokenizer_that_adds_a_space():
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    model = models.BPE({token: i for i, token in enumerate(sorted(alphabet))}, [])
    tokenizer = fast(model, pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=True), decoder=decoders.ByteLevel())
    assert encode_response(tokenizer, "ab")[1].tolist() == [0, 1, 2]
    assert encode_response(tokenizer, " b")[1].tolist() == [1, 2]
    assert sorted(token_bytes(tokenizer)) == [bytes([byte]) for byte in range(256)]


def test_a_token_without_bytes_of_its_own_is_refused_where_it_appears():
    tokenizer = metaspace(models.BPE({**LETTERS, "<unk>": 4}, [], unk_token="<unk>"))
    assert byte_ends(tokenizer, [1, 2]).tolist() == [1, 2]
    with pytest.raises(AlignmentError, match=r"id 4 .* cannot represent"):
        encode_response(tokenizer, "aXb")
    tokenizer.add_tokens([AddedToken("<think>", lstrip=True)])
    with pytest.raises(AlignmentError, match="white space beside it"):
        encode_response(tokenizer, "a <think>")
    gaps = metaspace(models.BPE({"a": 0, "b": 2}, []))
    with pytest.raises(AlignmentError, match=r"id 1 .* gap"):
        byte_ends(gaps, [0, 1])


@pytest.mark.parametrize(
    ("tokenizer", "message"),
    [
        (lambda: fast(models.WordPiece({"a": 0, "[UNK]": 1}, unk_token="[UNK]")), "WordPiece"),
        (lambda: fast(models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]")), "WordLevel"),
        (lambda: fast(models.BPE({"a</w>": 0}, [], end_of_word_suffix="</w>")), "</w>"),
        (lambda: fast(models.BPE({"a": 0}, [])), "no decoder of bytes"),
        (lambda: metaspace(models.Unigram([("a", 0.0)]), normalizer=normalizers.NFKC()), "NFKC.*Unigram"),
        (lambda: metaspace(models.BPE({"a": 0}, []), normalizer=normalizers.Lowercase()), "Lowercase"),
        (lambda: object(), "not a fast tokenizer"),
    ],
)
def test_a_tokenizer_whose_bytes_cannot_be_known_is_refused(tokenizer, message):
    with pytest.raises(AlignmentError, match=message):
        byte_ends(tokenizer(), [0])


def test_a_unigram_tokenizer_with_byte_fallback():
    vocabulary = [("<unk>", 0.0), ("▁a", -1.0), ("b", -1.0), *((f"<0x{byte:02X}>", -9.0) for byte in range(256))]
    tokenizer = metaspace(
        models.Unigram(vocabulary, unk_id=0, byte_fallback=True), pre_tokenizer=pre_tokenizers.Metaspace()
    )
    assert encode_response(tokenizer, "abé")[1].tolist() == [1, 2, 3, 4]


@pytest.mark.parametrize("text", SAMPLES)
def test_the_converted_tokenizers_write_what_their_makers_do(text):
    import sentencepiece
    from mistral_common.tokens.tokenizers.tekken import Tekkenizer

    mistral = Tekkenizer.from_file(package_file("mistral_common", TEKKEN))
    assert encode_response(tekken(), text)[0].tolist() == mistral.encode(text, bos=False, eos=False)
    model = sentencepiece.SentencePieceProcessor(model_file=str(package_file("mistral_common", SENTENCEPIECE)))
    if "  " in text:  # transformers merges runs of spaces in another order, and puts no dummy before a space
        return
    assert encode_response(sentencepiece_mistral(), text)[0].tolist() == model.encode(text)


def test_qwen_is_its_ranks():
    import tiktoken

    lines = package_file("dashscope", "resources/qwen.tiktoken").read_bytes().splitlines()
    ranks = {base64.b64decode(token): int(rank) for token, rank in (line.split() for line in lines)}
    assert [qwen().convert_tokens_to_ids(token) for token in QWEN_SPECIAL] == [151643, 151644, 151645]
    assert len(ranks) == 151643
    assert token_bytes(qwen())[: len(ranks)] == tuple(sorted(ranks, key=ranks.get))
    encoding = tiktoken.Encoding("qwen", pat_str=QWEN_PATTERN, mergeable_ranks=ranks, special_tokens={})
    for text in SAMPLES:
        assert encode_response(qwen(), text)[0].tolist() == encoding.encode_ordinary(text)
