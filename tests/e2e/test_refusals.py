"""What cannot work is said at once, with both values and the remedy: no engine is started for it."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import struct
import time
import zlib
from pathlib import Path

import msgpack
import pytest

from asyncrl.link.codec import HEADER_BYTES, encode
from asyncrl.link.messages import PROTOCOL_VERSION, Beat, Hello
from asyncrl.link.sockets import ClientSocket
from tests.e2e.daemons import STEP_S, Run, free_port, wait_until

MEBIBYTE = 2**20


@pytest.fixture(scope="module")
def served(module_run: Run) -> Run:
    """A learner that listens; its trainer starts beside it."""
    module_run.configure(transport={"max_frame_bytes": MEBIBYTE}, generator={"unreachable_timeout_s": 120.0})
    learner = module_run.learner()
    learner.wait_for_log("listening on")
    return module_run


@pytest.fixture
def other_model(tied_model_dir: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tied_model_dir, tmp_path / "other"))


def refused(run: Run, *overrides: str) -> str:
    """Starts a generator that must be refused with exit code 4; returns what it said."""
    generator = run.generator(*overrides)
    assert generator.exit_code(STEP_S) == 4, generator.last_words()
    assert "Traceback" not in generator.stderr
    assert not list((run.run_dir / "generators").glob("*.vllm.log")), "an engine was started"
    return generator.stderr.splitlines()[-1]


# -- refused at the hello


def test_another_tokenizer_is_refused_with_both_fingerprints(served, other_model):
    from asyncrl.host.fingerprints import tokenizer_fingerprint

    file = other_model / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    file.write_text(json.dumps(tokenizer))
    said = refused(served, f"model.path={other_model}")
    assert "(tokenizer)" in said
    assert tokenizer_fingerprint(Path(served.config["model"]["path"])) in said
    assert tokenizer_fingerprint(other_model) in said


def test_another_architecture_is_refused_with_both_fingerprints(served, other_model):
    from asyncrl.host.fingerprints import model_folder_fingerprint

    file = other_model / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"rms_norm_eps": 1e-4}))
    said = refused(served, f"model.path={other_model}")
    assert "(model)" in said
    assert model_folder_fingerprint(served.config["model"]["path"]) in said
    assert model_folder_fingerprint(str(other_model)) in said


def test_another_task_is_refused_with_both_names(served):
    said = refused(served, "task.path=asyncrl.tasks.arithmetic:Arithmetic", "task.args={}")
    assert "(task)" in said
    assert "letters_task:Letters" in said
    assert "asyncrl.tasks.arithmetic:Arithmetic" in said


def test_a_generator_of_another_run_is_refused(served):
    said = refused(served, "run.name=another")
    assert "run.name" in said
    assert "'e2e'" in said
    assert "'another'" in said


# -- refused before anything is bound


def test_a_second_learner_on_the_run_folder_is_refused_with_the_pid_of_the_first(served):
    second = served.learner(f"transport.address=tcp://127.0.0.1:{free_port()}")
    assert second.exit_code() == 6
    assert str(served.daemons[0].pid) in second.stderr
    assert "Traceback" not in second.stderr


def test_a_port_in_use_is_named_with_a_remedy(served, make_run):
    other = make_run().configure(transport={"address": served.config["transport"]["address"]})
    learner = other.learner()
    assert learner.exit_code() == 2
    assert re.search(r"cannot listen on tcp://127\.0\.0\.1:\d+.*choose another port", learner.stderr)
    assert "Traceback" not in learner.stderr
    wait_until(lambda: not other.processes(), 10.0, "no trainer without a learner")


@pytest.mark.parametrize("role", ["learner", "generator"])
def test_a_missing_model_folder_is_named(make_run, role):
    daemon = make_run().start(role, "model.path=/nowhere/model")
    assert daemon.exit_code() == 2
    assert "/nowhere/model" in daemon.stderr
    assert "Traceback" not in daemon.stderr


@pytest.mark.parametrize("role", ["learner", "generator"])
def test_an_unknown_key_is_answered_with_the_nearest_one(make_run, role):
    daemon = make_run().start(role, "sampling.group_sise=4")
    assert daemon.exit_code() == 2
    assert "sampling.group_size" in daemon.stderr
    assert "Traceback" not in daemon.stderr


def test_a_task_that_cannot_be_imported_is_a_user_error(make_run):
    learner = make_run().learner("task.path=letters_tusk:Letters")
    assert learner.exit_code() == 2
    assert "letters_tusk" in learner.stderr
    assert "Traceback" not in learner.stderr


# -- nobody answers


def test_an_unreachable_learner_ends_the_generator_with_exit_code_3(make_run):
    run = make_run().configure(generator={"unreachable_timeout_s": 1.0})
    generator = run.generator()
    assert generator.exit_code(STEP_S) == 3
    said = generator.stderr.splitlines()[-1]
    assert run.config["transport"]["address"] in said
    assert "generator.unreachable_timeout_s=1" in said
    assert "Traceback" not in generator.stderr


@pytest.mark.slow
def test_a_generator_says_every_10_s_that_it_reaches_nobody(make_run):
    generator = make_run().configure(generator={"unreachable_timeout_s": 25.0}).generator()
    assert generator.exit_code(STEP_S) == 3
    said = re.findall(r"no answer from the learner at tcp://\S+ for (\d+) s \(limit 25 s\): (.+)", generator.stderr)
    assert len(said) == 2
    assert all(int(seconds) - due in (0, 1) for (seconds, _), due in zip(said, (10, 20), strict=True))
    assert "nothing answers" in said[0][1]


def test_a_generator_that_waits_for_its_learner_stops_at_a_signal(make_run):
    generator = make_run().generator()
    generator.wait_for_log("incarnation 1")
    generator.signal(signal.SIGTERM)
    assert generator.exit_code(10.0) == 0


def test_a_generator_that_starts_its_engine_stops_at_a_signal_and_leaves_nothing(served):
    before = set(served.processes())
    generator = served.generator("generator.id=starting")
    generator.wait_for_log("starting the engine")
    started = time.monotonic()
    generator.signal_group(signal.SIGTERM)
    assert generator.exit_code(STEP_S) == 0, generator.last_words()
    assert time.monotonic() - started < 45.0  # an import under way is not broken off
    assert "Traceback" not in generator.stderr
    wait_until(lambda: set(served.processes()) <= before, 15.0, "the end of its processes")
    shutil.rmtree(served.run_dir / "generators")


def test_a_second_generator_of_the_same_id_is_refused(make_run):
    run = make_run()
    first = run.generator("generator.id=twin")
    first.wait_for_log("incarnation 1")
    second = run.generator("generator.id=twin")
    assert second.exit_code() == 2
    assert "generator.id='twin'" in second.stderr
    assert "Traceback" not in second.stderr
    assert first.running


# -- garbage on the port


def hello(name: str, run: Run) -> bytes:
    from asyncrl.config.loading import load_config
    from asyncrl.host.fingerprints import model_folder_fingerprint, tokenizer_fingerprint
    from asyncrl.tasks.fingerprint import shared_settings

    model = run.config["model"]["path"]
    message = Hello(
        protocol=PROTOCOL_VERSION,
        generator_id=name,
        incarnation=1,
        max_run_epoch=0,
        model_fingerprint=model_folder_fingerprint(model),
        tokenizer_fingerprint=tokenizer_fingerprint(Path(model)),
        task=run.config["task"]["path"],
        num_workers=1,
        first_unacked_seq=1,
        instance=name,
        settings=shared_settings(load_config(run.config_file)),
    )
    return encode(message, max_bytes=MEBIBYTE)


def bad_frames() -> list[bytes]:
    """Malformed in each layer: header, crc, length, a bomb, wrong types, a message of the other side."""
    good = encode(Beat(1, 0, [], 0, 0, 0, 0.0, 0.0, 0), max_bytes=MEBIBYTE)
    bomb = b"\xdd\xff\xff\xff\xff" + b"\x90" * 100_000
    return [
        b"",
        b"GET / HTTP/1.1\r\n\r\n",
        good[:-1] + bytes([good[-1] ^ 1]),
        good[: HEADER_BYTES - 1],
        good + b"more",
        frame(2, bomb),
        frame(2, b"\x91" * 5_000),
        frame(2, msgpack.packb(["text"] * 11)),
        frame(22, msgpack.packb([1, "train", 0, 0, 0, 1.0, b"", {}, 1, 1, 1.0])),
        frame(999, b"\x90"),
        os.urandom(MEBIBYTE - 1),
    ]


def frame(code: int, body: bytes) -> bytes:
    """A frame with a right header around any body."""
    head = struct.pack("<4sHHIQ", b"aRL\x01", 1, code, 0, len(body))
    return head + struct.pack("<I8s", zlib.crc32(body, zlib.crc32(head)), bytes(8)) + body


def answered(client: ClientSocket, request: bytes) -> bytes:
    """Sends until there is an answer: the connection may still be coming up."""
    reply: list[bytes] = []

    def ask() -> bool:
        client.send(request)
        if (received := client.recv(1.0)) is not None:
            reply.append(received)
        return bool(reply)

    wait_until(ask, STEP_S, "an answer of the desk")
    return reply[0]


def test_malformed_frames_are_dropped_and_the_desk_goes_on(served):
    learner, address = served.daemons[0], served.config["transport"]["address"]
    client = ClientSocket(address, max_frame_bytes=MEBIBYTE)
    for garbage in bad_frames():
        assert client.send(garbage, STEP_S)
    # The first is said, the others are counted.
    wait_until(lambda: "a generator's frame dropped" in learner.stderr, STEP_S, "the first one dropped", [learner])
    assert answered(client, hello("polite", served))
    client.close()
    assert learner.running


def test_an_oversized_frame_ends_its_connection_and_nothing_else(served):
    learner, address = served.daemons[0], served.config["transport"]["address"]
    before = resident_bytes(learner.pid)
    attacker = ClientSocket(address, max_frame_bytes=2**31 - 1)
    for _ in range(3):
        attacker.send(bytes(64 * MEBIBYTE), STEP_S)
    wait_until(lambda: attacker.disconnects > 0, STEP_S, "the end of the connection")
    attacker.close()
    polite = ClientSocket(address, max_frame_bytes=MEBIBYTE)
    assert answered(polite, hello("polite-too", served))
    polite.close()
    assert learner.running
    assert resident_bytes(learner.pid) - before < 32 * MEBIBYTE


def test_bytes_that_are_not_even_zeromq_do_no_harm(served):
    learner, address = served.daemons[0], served.config["transport"]["address"]
    host, port = address.removeprefix("tcp://").split(":")
    with socket.create_connection((host, int(port)), timeout=10.0) as raw:
        raw.sendall(os.urandom(4096))
    polite = ClientSocket(address, max_frame_bytes=MEBIBYTE)
    assert answered(polite, hello("polite-as-well", served))
    polite.close()
    assert learner.running


def resident_bytes(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
