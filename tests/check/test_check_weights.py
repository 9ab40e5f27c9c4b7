"""What a check says of weights from the consensus before anything starts."""

import json

from rayfuse.check.data import check_data
from rayfuse.config import Stored, parse_config

STAGE = {"method": "infifusion", "teacher_weights": "consensus", "sample_weights": "consensus"}


def faults(config):
    return [finding.text for finding in check_data(config) if finding.fault]


def test_rows_that_lack_the_weights_which_a_stage_reads_are_a_fault(tiny, tmp_path):
    config = parse_config(tiny.tree(tmp_path / "run", stages=[STAGE]))
    (text,) = faults(config)
    assert "has no 'sample_weight', which `sample_weights: consensus` reads" in text
    rows = [json.loads(line) for line in (tiny.root / "train.jsonl").read_text().splitlines()[:20]]
    weighted = tmp_path / "choices.jsonl"
    names = [teacher.name for teacher in config.teachers]
    columns = {"sample_weight": 0.9, "teacher_weights": dict.fromkeys(names, 0.5)}
    weighted.write_text("".join(json.dumps({**row, **columns}) + "\n" for row in rows))
    changed = tiny.tree(tmp_path / "run", stages=[STAGE])
    data = changed["data"] if isinstance(changed["data"], dict) else {"path": changed["data"]}
    assert faults(parse_config({**changed, "data": {**data, "path": str(weighted)}})) == []


def test_a_stage_that_weighs_by_the_consensus_learns_nothing_from_stored_signals(tiny, tmp_path):
    tree = tiny.tree(tmp_path / "run", stages=[STAGE], consensus={})
    config = parse_config(tree)
    stored = config.teachers[0].model_copy(update={"stored": Stored(fingerprint="0" * 32)})
    told = config.model_copy(update={"teachers": (stored, *config.teachers[1:])})
    texts = []
    for finding in check_data(told):
        texts.append(finding.text)
        if "for their signals set teacher_weights: uniform" in finding.text:
            break
    assert f"learns nothing from {stored.name}, which answer nothing and so have weight 0" in texts[-1]
