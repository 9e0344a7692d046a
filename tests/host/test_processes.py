"""What daemons need from the operating system."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from asyncrl.desk.trainer_process import rank_environment
from asyncrl.errors import ConfigError
from asyncrl.host import processes
from asyncrl.host.processes import cpu_problem, heap_environment, nccl_environment, pin_to

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


@pytest.mark.parametrize(
    ("interface", "chosen", "expected"),
    [("eth1", None, "=eth1"), ("eth1", "ib0", None), (None, None, None)],
)
def test_nccl_is_given_the_interface_of_the_weights_unless_the_user_chose(monkeypatch, interface, chosen, expected):
    monkeypatch.delenv("NCCL_SOCKET_IFNAME", raising=False)
    if chosen:
        monkeypatch.setenv("NCCL_SOCKET_IFNAME", chosen)
    monkeypatch.setattr(processes, "interface_towards", {"10.0.0.1": interface}.get)
    assert nccl_environment(30.0, "10.0.0.1").get("NCCL_SOCKET_IFNAME") == expected
    assert "NCCL_SOCKET_IFNAME" not in nccl_environment(30.0)


FAULTS_OF_PASSES = """
import resource
def work():
    blocks = [bytearray(30 << 20) for _ in range(3)]
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(3):
    work()
before = faults()
for _ in range(3):
    work()
kept = bytearray(30 << 20)
(huge,) = (line.split()[1] for line in open("/proc/self/smaps_rollup") if line.startswith("AnonHugePages"))
print(faults() - before, huge)
"""


def page_faults(environment):
    """Of a process that takes and frees the same blocks again and again; and KiB that it has in huge pages."""
    command = [sys.executable, "-c", FAULTS_OF_PASSES]
    run = subprocess.run(command, env=os.environ | environment, check=True, capture_output=True, timeout=60)
    return [int(word) for word in run.stdout.split()]


@pytest.mark.skipif(os.confstr("CS_GNU_LIBC_VERSION") is None, reason="another C library")
def test_a_heap_for_training_keeps_what_is_freed():
    many, none = page_faults({"GLIBC_TUNABLES": ""})
    few, huge = page_faults(heap_environment())
    assert many > 20_000
    assert few < 50
    if "[madvise]" in Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text():
        assert none == 0 and huge > 25_000


def test_a_heap_that_the_user_has_set_up_is_left_alone(monkeypatch):
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.tcache_count=0")
    assert rank_environment(1, 10.0, "")["GLIBC_TUNABLES"] == "glibc.malloc.tcache_count=0"
    monkeypatch.delenv("GLIBC_TUNABLES")
    assert rank_environment(1, 10.0, "")["GLIBC_TUNABLES"] == heap_environment()["GLIBC_TUNABLES"]


def test_a_process_knows_its_age_from_before_its_first_line():
    script = "import time; from asyncrl.host.processes import process_age_s; print(time.time() - process_age_s())"
    before = time.time()
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    # A hundredth is what the kernel counts in.
    assert before - 0.02 <= float(done.stdout) <= before + 0.5 * (time.time() - before) + 0.02
