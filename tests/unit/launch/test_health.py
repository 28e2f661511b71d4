"""The check of nodes: what one node finds, and which node is to blame."""

import json
import os
import socket
from collections import namedtuple

import pytest

from megaroute.launch import health

Usage = namedtuple("Usage", "total used free")


def report(folder, host, problems=(), unreachable=()):
    value = {"port": 1, "problems": list(problems), "unreachable": list(unreachable)}
    (folder / f"{host}.json").write_text(json.dumps(value))


def test_full_disk_is_found(tmp_path, monkeypatch):
    assert health.disk(tmp_path / "not" / "there" / "yet") == []
    monkeypatch.setattr(health.shutil, "disk_usage", lambda path: Usage(1 << 40, 1 << 40, 5 << 20))
    (problem,) = health.disk(tmp_path)
    assert "has 5 MiB free" in problem


def test_too_few_devices_are_found(monkeypatch):
    monkeypatch.setenv("MEGAROUTE_TASKS_PER_NODE", "4")
    monkeypatch.setattr(health.devices, "device_ids", lambda: ["0", "1"])
    assert health.visible("auto") == ["2 devices visible for 4 tasks"]
    assert health.visible("cpu") == []


def test_wrong_clock_is_found(tmp_path, monkeypatch):
    assert health.clock(tmp_path) == []
    monkeypatch.setattr(health.time, "time", lambda: os.stat(tmp_path).st_mtime + 500)
    assert "+500 s away" in health.clock(tmp_path)[0]
    assert list(tmp_path.iterdir()) == []


def test_unreachable_peer_is_named(tmp_path, monkeypatch):
    with socket.create_server(("", 0)) as listener:
        report(tmp_path, "localhost")
        text = (tmp_path / "localhost.json").read_text().replace('"port": 1', f'"port": {listener.getsockname()[1]}')
        (tmp_path / "localhost.json").write_text(text)
        monkeypatch.setattr(health, "WAIT_S", 0.2)
        assert health.peers(tmp_path, ["localhost"]) == []
        assert health.peers(tmp_path, ["localhost", "silent"]) == ["silent"]


def test_blame_goes_to_the_node_that_most_others_miss(tmp_path):
    hosts = ["a", "b", "c", "d"]
    report(tmp_path, "a", unreachable=["d"])
    report(tmp_path, "b", problems=["no memory"], unreachable=["d"])
    report(tmp_path, "c", unreachable=["d"])
    report(tmp_path, "d", unreachable=["a", "b", "c"])
    assert health.bad_hosts(tmp_path, hosts) == {"b": "no memory", "d": "3 of 3 nodes cannot reach it"}


def test_of_two_nodes_neither_is_to_blame_for_the_line_between_them(tmp_path):
    report(tmp_path, "a", unreachable=["b"])
    report(tmp_path, "b")
    assert health.bad_hosts(tmp_path, ["a", "b"]) == {}
    assert health.unreached(tmp_path, ["a", "b"]) == ["a cannot reach b"]


def test_node_without_an_answer_is_bad(tmp_path):
    report(tmp_path, "a")
    assert health.bad_hosts(tmp_path, ["a", "b"]) == {"b": "it did not answer"}


@pytest.mark.parametrize("free, found", [(1 << 40, 0), (5 << 20, 1)])
def test_memory(monkeypatch, free, found):
    monkeypatch.setattr(health.psutil, "virtual_memory", lambda: namedtuple("M", "available")(free))
    assert len(health.memory()) == found
