"""What a rank tells its supervisor, and what that makes of it."""

import base64
import json
import pickle

import pytest

from ddpm_dist.cluster import rank, supervisor
from ddpm_dist.errors import HangError

MARKS = {"start": 11.0, "group": 11.5, "engine": 11.75, "state": 12.0, "first_batch": 13.0, "first_step": 15.0}


def test_words_may_come_in_any_pieces() -> None:
    words = [{"mark": "start", "at": 1.5}, {"alive": True}, {"mark": "start", "at": 9.0}]
    words.append({"error": base64.b64encode(pickle.dumps(HangError("no step"))).decode()})
    data = b"".join(json.dumps(word).encode() + b"\n" for word in words)
    for size in (1, 7, len(data)):
        told = rank.Told()
        for begin in range(0, len(data), size):
            told.hear(data[begin : begin + size])
        assert told.marks == {"start": 1.5}, "the first counts"
        assert isinstance(told.error, HangError)
        assert told.rest == b""


def test_the_cost_of_a_restart_is_the_sum_of_its_parts() -> None:
    assert supervisor.cost(10.0, MARKS) == (
        "restarted in 5.00 s: start 1.00, group 0.50, engine 0.25, state 0.25, first batch 1.00, first step 2.00"
    )
    assert sum(rank.durations(10.0, MARKS).values()) == MARKS["first_step"] - 10.0
    assert rank.durations(20.0, {"start": 11.0}) == {"start": 0.0}, "of a node whose clock is behind"


def test_a_restart_is_told_to_tensorboard_under_names_that_others_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rank, "_told", {})
    assert rank.tell("start")
    assert not rank.tell("start"), "a part is done once"
    assert rank.restart_parts() == {}, "this was no restart"
    monkeypatch.setattr(rank, "_told", dict(MARKS))
    monkeypatch.setenv(rank.FAILED_AT, "10.0")
    assert rank.restart_parts() == {
        "restart/seconds": 5.0,
        "restart/infrastructure_recovery_from_disruption": 1.0,
        "restart/group": 0.5,
        "restart/training_prep": 0.25,
        "restart/unproductive_checkpoint_restore_time": 0.25,
        "restart/data_loading_sync": 1.0,
        "restart/program_startup": 2.0,
    }
