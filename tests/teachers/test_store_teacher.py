"""A teacher that is only its stored signals."""

import io

import pytest
import ray
from rich.console import Console

from rayfuse.check import check_config
from rayfuse.config import Data, parse_config
from rayfuse.data.rows import read_samples
from rayfuse.errors import ConfigError, MissingSignalsError
from rayfuse.prepare.preparer import Preparer
from rayfuse.prepare.spec import PrepareSpec
from rayfuse.signals.store import SignalStore
from rayfuse.teachers import identity
from rayfuse.teachers.identity import IdentifiedTeacher, fingerprint
from rayfuse.teachers.serving.applications import deploy
from rayfuse.teachers.stored import StoreTeacher
from rayfuse.teachers.transformers import TransformersTeacher

K = 5


@pytest.fixture
def written(tiny, tmp_path):
    """A store with what `math` said about the first eight samples: its URL, the fingerprint, the samples."""
    teacher = parse_config(tiny.tree(tmp_path / "run")).teachers[0]
    samples, _ = read_samples(Data(path=str(tiny.root / "train.jsonl"), limit=8))
    store, name = SignalStore(str(tmp_path / "store")), fingerprint(teacher, K)
    for sample, signals in zip(samples, TransformersTeacher(teacher, K).score(samples), strict=True):
        store.put(name, sample.key, signals)
    store.describe(name, {"name": "math", "k": K})
    return store, name, samples


def air_gapped(tiny, tmp_path, store, **teacher):
    tree = tiny.tree(tmp_path / "run", teachers=[{"model": "acme-math", "name": "math", "backend": "store", **teacher}])
    return parse_config({**tree, "signals": {"k": K, "store": store.url}})


def test_a_unit_comes_from_the_store_alone(tiny, tmp_path, written):
    """No weights, no tokenizer, no Serve: the batch is the one that a live teacher gives."""
    store, name, samples = written
    live = parse_config(tiny.tree(tmp_path / "run")).teachers[0]
    absent = air_gapped(tiny, tmp_path, store, stored=name).teachers[0]
    assert fingerprint(absent, K) == name
    deploy(identity.live([IdentifiedTeacher(absent, name)]), K)
    assert not ray.is_initialized()
    batches = []
    for teacher in (live, absent):
        spec = PrepareSpec(
            student=parse_config(tiny.tree(tmp_path / "run")).student,
            teachers=(IdentifiedTeacher(teacher, name),),
            store=store.url,
            k=K,
            alignment="bytes",
            max_length=200,
        )
        batches.append(Preparer(spec, lambda one: StoreTeacher(one, store.url))(samples))
    (mine,), (theirs,) = (batch.targets for batch in batches)
    assert mine.rows.tolist() == theirs.rows.tolist()
    assert mine.logps.tobytes() == theirs.logps.tobytes()
    assert batches[1].stats["forwarded/math"] == 0


def test_the_fingerprint_is_worked_out_where_the_files_are(tiny, tmp_path, written):
    store, name, _ = written
    here = air_gapped(tiny, tmp_path, store, model=tiny.model("math"), dtype="float32").teachers[0]
    assert fingerprint(here, K) == name


def test_a_missing_sample_is_named_with_what_to_do(tiny, tmp_path, written):
    store, name, samples = written
    store.fs.rm_file(store.path(name, samples[3].key))
    absent = air_gapped(tiny, tmp_path, store, stored=name).teachers[0]
    with pytest.raises(MissingSignalsError) as caught:
        StoreTeacher(IdentifiedTeacher(absent, name), store.url).score(samples)()
    assert str(caught.value) == (
        f"teacher math has no signals of sample {samples[3].key[:12]} ({samples[3].response!r:.60}) in {store.url}, "
        f"fingerprint {name}, and its backend is `store`, which asks nobody: run these data once with this teacher's "
        "live backend and the same store, or leave the sample out"
    )


def test_a_fingerprint_that_is_not_there_is_told_from_those_that_are(tiny, tmp_path, written):
    store, name, samples = written
    absent = air_gapped(tiny, tmp_path, store, stored="0" * 32).teachers[0]
    with pytest.raises(MissingSignalsError, match=f"it holds: {name} \\(math\\). Set stored.fingerprint"):
        StoreTeacher(IdentifiedTeacher(absent, "0" * 32), store.url).score(samples)()


def test_check_counts_what_is_missing(tiny, tmp_path, written):
    """The check of a run on 120 samples whose store has eight."""
    store, name, _ = written
    output = io.StringIO()
    faults = check_config(air_gapped(tiny, tmp_path, store, stored=name), Console(file=output, width=200))
    assert [fault.where for fault in faults] == ["teachers.0 (math)"]
    assert "of the first 50 samples are missing: teacher math has no signals of sample" in faults[0].text


@pytest.mark.parametrize(
    ("method", "asks"), [("kl", True), ("bytekd", True), ("multilevelot", False), ("trust", False)]
)
def test_check_asks_for_the_tokenizer_where_the_method_reads_tokens(tiny, tmp_path, written, method, asks):
    store, name, _ = written
    config = air_gapped(tiny, tmp_path, store, stored=name)
    stages = [{"method": method, "steps": 1, "batch_size": 16}]
    config = parse_config({**config.model_dump(), "stages": stages})
    said = f"{method} reads the teacher's tokens: set `tokenizer` to the folder of its tokenizer"
    faults = check_config(config, Console(file=io.StringIO()))
    assert (said in [fault.text for fault in faults]) == asks


@pytest.mark.parametrize(
    ("teacher", "said"),
    [
        ({"stored": "abc"}, "stored.fingerprint: String should match pattern"),
        ({"gpus": 1}, "backend store runs no model here: gpus must be 0, but is 1"),
        ({"backend": "transformers", "stored": {}}, "backend transformers has no `stored` section"),
    ],
)
def test_a_description_that_makes_no_sense_is_refused(tiny, tmp_path, written, teacher, said):
    with pytest.raises(ConfigError, match=said):
        air_gapped(tiny, tmp_path, written[0], **teacher)
