"""Over which backend weights reach a generator, by the cards that it and the learner compute on."""

from __future__ import annotations

import pytest

from asyncrl.link.weight_records import Placement
from asyncrl.weights.plan.backends import BackendRefused, backend_for

HOST, OTHER_HOST = "boot-1", "boot-2"


def at(*gpus, machine=HOST, memory="1000@1"):
    return Placement(machine, memory, gpus)


@pytest.mark.parametrize(
    ("wanted", "learner", "generator", "expected"),
    [
        ("auto", at(), at(), "gloo"),
        ("auto", at("a"), at(), "gloo"),
        ("auto", at(), at("a"), "gloo"),
        ("auto", at("a"), at("b"), "nccl"),
        ("auto", at("a"), at("b", "c"), "nccl"),
        ("auto", at("a"), at("a"), "ipc"),
        ("auto", at("a"), at("a", machine=OTHER_HOST), "nccl"),
        ("auto", at("a"), at("b", memory="0@2"), "nccl"),
        ("gloo", at("a"), at("a"), "gloo"),
        ("nccl", at("a"), at("b"), "nccl"),
        ("ipc", at(), at(), "ipc"),
        ("ipc", at("a"), at("a"), "ipc"),
    ],
)
def test_each_generator_gets_the_backend_that_works_between_both(wanted, learner, generator, expected):
    assert backend_for(wanted, learner, generator) == expected


@pytest.mark.parametrize(
    ("wanted", "learner", "generator", "said"),
    [
        ("nccl", at("a"), at("a"), "both compute on GPU a, and NCCL refuses two processes on one card; .*=auto or ipc"),
        ("nccl", at("a", "b"), at("c", "b"), "both compute on GPU b"),
        ("nccl", at("a"), at(), "the generator computes on the CPU; set weights.backend=auto, or generator.device"),
        ("nccl", at(), at("a"), "the learner computes on the CPU"),
        ("ipc", at(), at(machine=OTHER_HOST), "run on two machines; use gloo or nccl"),
        ("ipc", at("a"), at("b"), r"learner \(GPU a\) and generator \(GPU b\) must compute on one and the same device"),
        ("ipc", at("a"), at(), r"learner \(GPU a\) and generator \(the CPU\) must compute on one"),
        ("ipc", at(), at(memory="1001@1"), "run both as one user in one PID namespace .*1000@1 and 1001@1"),
        ("auto", at("a"), at("a", memory="1000@2"), "in one PID namespace .*give them different ones, or set .*gloo"),
        ("auto", at("a"), at("a", "b"), "NCCL refuses two processes on one card; give them different cards"),
        ("auto", at("a", "b"), at("b"), "NCCL refuses two processes on one card; give them different cards"),
    ],
)
def test_what_cannot_work_is_refused_with_both_ends_and_the_remedy(wanted, learner, generator, said):
    with pytest.raises(BackendRefused, match=said):
        backend_for(wanted, learner, generator)
