"""Device detection without torch."""

import os

import pytest

from megaroute.common.errors import LaunchError
from megaroute.launch import devices


@pytest.fixture
def machine(monkeypatch):
    """Pretend to be a machine with so many devices, a build of torch, and CUDA_VISIBLE_DEVICES."""

    def pretend(count: int, torch: str = "2.13.0+cu130", visible: str | None = None) -> None:
        monkeypatch.setattr(devices, "_count_devices", lambda: count)
        monkeypatch.setattr(devices, "_torch_version", lambda: torch)
        if visible is None:
            monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        else:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)

    return pretend


@pytest.mark.parametrize(
    "count, torch, visible, expected",
    [
        (4, "2.13.0", None, "cuda"),
        (4, "2.13.0", "", "cpu"),
        (4, "2.13.0", "-1", "cpu"),
        (4, "2.13.0+cpu", None, "cpu"),
        (0, "2.13.0", None, "cpu"),
        (0, "2.13.0", "0", "cpu"),
    ],
)
def test_auto_takes_cuda_where_a_device_shows_and_torch_can_use_it(machine, count, torch, visible, expected):
    machine(count, torch, visible)
    assert devices.detect_device("auto") == expected


def test_cpu_is_taken_when_asked_for(machine):
    machine(4)
    assert devices.detect_device("cpu") == "cpu"


@pytest.mark.parametrize("count, torch, reason", [(0, "2.13.0", "no NVIDIA device"), (1, "2.13.0+cpu", "for the CPU")])
def test_cuda_without_a_device_or_a_build_is_refused(machine, count, torch, reason):
    machine(count, torch)
    with pytest.raises(LaunchError, match=f"run.device is cuda.*{reason}"):
        devices.detect_device("cuda")


@pytest.mark.parametrize(
    "visible, expected", [(None, ["0", "1", "2"]), ("2, 1", ["2", "1"]), ("GPU-ab", ["GPU-ab"]), ("-1", [])]
)
def test_ids_are_those_the_user_left_visible(machine, visible, expected):
    machine(3, visible=visible)
    assert devices.device_ids() == expected


def test_hidden_devices_are_seen_by_no_one(machine, monkeypatch):
    machine(3)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    devices.hide_devices(os.environ)
    assert devices.device_ids() == []
