"""Phases: added up by name while recorded, free and silent otherwise."""

import time

import torch

from semvid.parallel import phases
from semvid.parallel.collectives import all_gather
from semvid.parallel.phases import phase, recording


def test_spans_of_one_name_add_up_in_the_order_they_began() -> None:
    with recording(torch.device("cpu")) as recorder:
        for name in ("a", "b", "a"):
            with phase(name, on_host=name == "b"):
                time.sleep(0.01)
    found = recorder.milliseconds()
    assert list(found) == ["a", "b"]
    assert found["a"] >= 20
    assert found["b"] >= 10


def test_nothing_is_recorded_outside_and_recordings_nest() -> None:
    with phase("before"):
        pass
    with recording(torch.device("cpu")) as outer:
        with recording(torch.device("cpu")) as inner, phase("inside"):
            pass
        with phase("outside"):
            pass
    assert list(inner.milliseconds()) == ["inside"]
    assert list(outer.milliseconds()) == ["outside"]
    assert phases._recorder is None


def test_collectives_are_told_inside_alone_and_those_of_one_rank_are_none() -> None:
    told: list[int] = []
    phases.enter()
    with phases.counting(lambda: told.append(0)):
        phases.enter()
        with phases.counting(lambda: told.append(1)):
            phases.enter()
        phases.enter()
        all_gather(torch.zeros(2), None)
    phases.enter()
    assert told == [0, 1, 0]
