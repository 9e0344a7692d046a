"""What daemons need from the operating system."""

import os

import pytest

from asyncrl.errors import ConfigError
from asyncrl.host.processes import cpu_problem, pin_to

NO_SUCH_CPU = 4095


def test_a_process_is_not_pinned_to_cpus_that_it_may_not_use():
    before = os.sched_getaffinity(0)
    with pytest.raises(
        ConfigError, match=r"learner\.cpus=\[4095\]: this process may use only CPUs .*set learner\.cpus"
    ):
        pin_to([NO_SUCH_CPU], "learner.cpus")
    assert os.sched_getaffinity(0) == before


def test_usable_cpus_and_no_cpus_are_no_problem():
    usable = sorted(os.sched_getaffinity(0))
    assert cpu_problem(usable[:1], "generator.cpus") is None
    assert cpu_problem([], "generator.cpus") is None
    pin_to([], "generator.cpus")
    assert sorted(os.sched_getaffinity(0)) == usable
