"""What ranks say about their end, and what follows from it for the run."""

import json

import pytest

from megaroute.common.errors import ConfigError, MegarouteError
from megaroute.launch import exits


@pytest.fixture
def rank(tmp_path, monkeypatch):
    """`rank(3, code, why)`: what rank 3 writes."""
    monkeypatch.setenv(exits.FOLDER, str(tmp_path))

    def write(number: int, code: int, why: str = "") -> None:
        monkeypatch.setenv("RANK", str(number))
        exits.write(code, why)

    return write


@pytest.mark.parametrize(
    "codes, status, ending",
    [
        ([0, 0], 0, "finished"),
        ([75, 75], 0, "stopped"),
        ([0], 0, "died"),
        ([75, 0], 0, "died"),
        ([75], 143, "died"),
        ([], 0, "died"),
        ([], 1, "died"),
        ([], 143, "died"),
        ([69, 69], 1, "died"),
        ([69, 1], 1, "failed"),
        ([75, 1], 1, "failed"),
        ([2, 2], 2, "bad input"),
        ([69, 70], 143, "hung"),
        ([], 70, "hung"),
    ],
)
def test_outcome_of_two_ranks(rank, tmp_path, codes, status, ending):
    for number, code in enumerate(codes):
        rank(number, code)
    assert exits.outcome(tmp_path, 2, status).ending == ending


def test_reason_names_rank_and_host(rank, tmp_path):
    rank(1, 1, "the loss is not finite")
    why = exits.outcome(tmp_path, 2, 1).why
    assert why.startswith("rank 1 on ")
    assert why.endswith(": the loss is not finite")


def test_ranks_that_said_nothing_are_named(rank, tmp_path):
    rank(0, 69, "connection closed by peer")
    assert exits.outcome(tmp_path, 3, 137).why == "ranks 1, 2 of 3 ended without a word (exit status 137)"


@pytest.mark.parametrize(
    "error, code",
    [
        (RuntimeError("[../gloo/transport/tcp/pair.cc:534] Connection closed by peer [10.0.0.1]:1"), exits.LOST),
        (RuntimeError("NCCL error: remote process exited"), exits.LOST),
        (OSError(5, "Input/output error"), exits.LOST),
        (MegarouteError("rank 1 lost its connection to another rank"), exits.LOST),
        (RuntimeError("shape mismatch"), exits.FAILED),
        (ValueError("connection closed"), exits.FAILED),
        (MegarouteError("the loss is not finite"), exits.FAILED),
        (ConfigError("train.steps is 0"), exits.BAD_INPUT),
    ],
)
def test_code_says_who_is_to_blame(error, code):
    assert exits.code_of(error) == code


def test_first_word_of_a_rank_counts_and_the_exception_goes_on(rank, tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(RuntimeError), exits.recorded():
        exits.write(70, "no step for 60 s")
        raise RuntimeError("aborted")
    assert json.loads((tmp_path / "rank-00000.json").read_text())["code"] == 70


@pytest.mark.parametrize("code", [0, 75])
def test_rank_that_ends_in_order_does_not_look_like_a_crash_to_srun(rank, tmp_path, code):
    with exits.recorded() as codes:
        codes.append(code)
    assert exits.process_code(code) == 0
    assert json.loads((tmp_path / "rank-00000.json").read_text())["code"] == code


def test_without_a_launcher_the_code_is_the_processes(monkeypatch):
    monkeypatch.delenv(exits.FOLDER, raising=False)
    exits.write(1)
    assert exits.process_code(75) == 75
