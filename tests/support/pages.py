"""Reports of runs that a test makes up, and what they say."""

import re
from html.parser import HTMLParser

import yaml

from megaroute.metrics.records import EventRecord, to_json
from megaroute.metrics.report import write_report

VOID = {"meta", "br", "link", "img", "input", "hr"}


class Page(HTMLParser):
    """Balanced tags, their attributes, and the visible text."""

    def __init__(self, text):
        super().__init__()
        self.stack, self.tags, self.words = [], [], []
        self.feed(text)
        self.close()
        assert self.stack == []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.stack.pop() == tag

    def handle_data(self, data):
        if self.stack and self.stack[-1] != "style":
            self.words.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())

    def attributes(self, name):
        return [given[name] for _, given in self.tags if name in given]


def report(run_dir):
    path = write_report(run_dir)
    assert path == run_dir / "report.html"
    return path.read_text(encoding="utf-8")


def only_metrics(run_dir, records, tail=""):
    (run_dir / "metrics.jsonl").write_text("".join(to_json(record) + "\n" for record in records) + tail)
    return run_dir


def routed_run(run_dir, train_record, routing, units, num_layers=4, **changes):
    """Files of a run of 30 steps with a routing section."""
    config = {"run": {"name": "routed"}, "model": {"num_layers": num_layers}, "routing": routing}
    (run_dir / "config.yaml").write_text(yaml.safe_dump(config))
    start = EventRecord(kind="start", step=0, attempt=1, message="started", values={"units": units})
    recorded = {
        "flops": {"mlp": 4e9, "attention": 1.5e9, "padding": 0.5e9},
        "rows": tuple(2100 for _ in units),
        "overflow": tuple(41 for _ in units),
        "overflow_flops": 3e8,
        "load": {"ranks": 1.25, "units": tuple(1.5 for _ in units), "stages": (30.0, 10.0)},
    }
    density = tuple(0.5 for _ in units)
    records = [train_record(step, **{"density": density, **recorded, **changes}) for step in range(1, 31)]
    return only_metrics(run_dir, [start, *records])


def table_cells(text):
    """Rows of the table of units."""
    table = re.search(r'<table class="numbers">(.*?)</table>', text, flags=re.DOTALL).group(1)
    rows = re.findall(r"<tr>(.*?)</tr>", table, flags=re.DOTALL)
    return [re.findall(r"<td>(.*?)</td>", row) for row in rows[1:]]
