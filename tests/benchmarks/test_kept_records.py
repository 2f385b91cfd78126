"""The published tables come from the lines that stand beside them, all of them."""

import argparse
from pathlib import Path

import kv_recall

RESULTS = Path(kv_recall.__file__).parent / "results"


def test_the_table_of_recall_is_remade_from_its_lines(tmp_path):
    for lines in RESULTS.glob("kv_recall-*.jsonl"):
        options = argparse.Namespace(model="demo:smollm2", tokens=800)
        made = kv_recall.table(lines, {"cpu": "unknown"}, options)
        assert made.rstrip() == lines.with_suffix(".md").read_text(encoding="utf-8").rstrip(), lines.name
