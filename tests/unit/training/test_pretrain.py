"""What a run writes before its first step."""

import json
import re

from megaroute.metrics.records import EventRecord, to_json
from megaroute.training.pretrain import first_line


def test_a_log_starts_with_date_attempt_directory_and_command(tmp_path):
    (tmp_path / "version.json").write_text(json.dumps({"argv": ["megaroute", "launch", "a b.yaml"]}))
    (tmp_path / "metrics.jsonl").write_text(to_json(EventRecord(kind="stop", step=3, attempt=1, message="")) + "\n")
    line = first_line(tmp_path)
    assert re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d[+-]\d\d:\d\d \| attempt 2 in ", line)
    assert line.endswith(f"{tmp_path} | megaroute launch 'a b.yaml'")
