"""Weights: what a digest sees, what an engine computes with, which model folders are trained, where channels meet."""

from __future__ import annotations

import json
import os
import socket
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Qwen3MoeForCausalLM

from asyncrl.config import UpdateConfig
from asyncrl.config.host_checks import check_host
from asyncrl.config.loading import load_config
from asyncrl.errors import BindError, ConfigError, ModelError
from asyncrl.generator.engines.vllm.bits_in_use import num_unwritten
from asyncrl.generator.engines.vllm.expert_weights import aliases
from asyncrl.host.model_folder import find_model
from asyncrl.host.model_head import check_head
from asyncrl.link.messages import SyncAbort, SyncCommit, SyncReply
from asyncrl.link.trainer_messages import OpenChannel
from asyncrl.link.weight_records import BitsInUse, ChannelSpec
from asyncrl.link.wire_types import SyncPhase
from asyncrl.trainer.engines.policy import Policy
from asyncrl.trainer.engines.trainable import apply_update, frozen_digests, patched_source
from asyncrl.weights.bytes.digest import digest
from asyncrl.weights.bytes.snapshot import SnapshotBuffer
from asyncrl.weights.channels.channel import WeightChannel
from asyncrl.weights.channels.rendezvous import WeightStore
from asyncrl.weights.plan.records import Committed, SyncFailed
from asyncrl.weights.publisher import Publisher
from benchmarks.speed.digest import damages, try_damage
from tests.generator.engines.vllm.test_direct_apply import HIDDEN, Model, Worker, checkpoint, manifest_of
from tests.tiny_experts import expert_config
from tests.trainer.tiny import save_tiny_model
from tests.weights.plan.test_planner import CANARY, DIGESTS, Bench, kinds, messages

TRIES = 2000


def test_W1_a_complemented_word_and_8_kib_of_ones_have_another_digest():
    zeros, ones = torch.zeros(8192, dtype=torch.uint8), torch.full((8192,), 255, dtype=torch.uint8)
    assert digest(zeros) != digest(ones)
    words = torch.randint(-(2**62), 2**62, (64,))
    for index in range(64):
        other = words.clone()
        other[index] = ~other[index]
        assert digest(other) != digest(words)


@pytest.mark.parametrize("kind", ["flip", "complement", "swap", "shift"])
def test_W1_no_damage_to_words_gets_past_the_digest(kind):
    counted, unseen = try_damage(damages()[kind], TRIES)
    assert counted >= TRIES and unseen == 0


@pytest.mark.parametrize("kind", ["flip", "complement", "swap", "shift"])
def test_W1_the_tries_would_find_a_digest_that_is_blind(kind, monkeypatch):
    """The digest of before: it folded with an arithmetic shift, and keys went up by the same number."""

    def blind(flat):
        words = flat.numpy().view(np.int64)
        keys = 2 * np.arange(len(words), dtype=np.int64) + 1
        return int(((words ^ (words >> 32)) * keys).sum())

    monkeypatch.setattr("asyncrl.weights.bytes.digest.digest", blind)
    _, unseen = try_damage(damages()[kind], TRIES)
    assert (unseen > 0) == (kind == "complement")


def test_W1_a_single_changed_word_at_every_place_is_seen_whatever_it_becomes():
    base = torch.zeros(300, dtype=torch.int64)
    values = [1, -1, 2**62, -(2**63), 2**32, -(2**32), 0x3F800000, 0x3F80000000000000]
    seen = {digest(base)}
    for place in range(300):
        for value in values:
            base[place] = value
            seen.add(digest(base))
        base[place] = 0
    assert len(seen) == 1 + 300 * len(values)


# -- bits in use ------------------------------------------------------------------------------------------------------


def report(worker, version, named):
    worker.direct.read_packed()
    return worker.direct.report(version, named)


def swapped(in_use, canary=None, tolerance=1e-4, workers=1):
    """What a generator's answer to a swap comes to: the outputs of the learner's planner."""
    bench = Bench(tolerance=tolerance)
    bench.planner.joined("a", 1, workers, bench.now)
    bench.snapshot(0)
    bench.open_channel()
    staged = SyncReply(1, 0, bench.round.attempt, SyncPhase.STAGE, "", [DIGESTS] * workers)
    bench.planner.reply("a", staged, bench.now)
    bench.after(0.0)
    bench.broadcast_done()
    return bench, bench.reply("a", "swap", in_use=in_use, canary=canary)


GOOD = BitsInUse(0, 9, [], [])


@pytest.mark.parametrize(
    ("in_use", "reason"),
    [
        (
            [BitsInUse(0, 9, ["model.norm.weight"], [])],
            "weights in use on rank 1 are not those that were staged: model",
        ),
        ([BitsInUse(3, 9, [], [])], "bits in use on rank 1 were compared with version 3, not 0"),
        ([], "bits in use of 0 workers came, it has 1"),
        ([GOOD, GOOD], "bits in use of 2 workers came, it has 1"),
        ([BitsInUse(0, 0, [], [])], "no weight in use on rank 1 was compared"),
    ],
)
def test_W2_a_generator_whose_bits_in_use_differ_is_tainted_and_never_committed(in_use, reason):
    bench, outputs = swapped(in_use)
    (failed,) = kinds(outputs, SyncFailed)
    assert reason in failed.reason and not kinds(outputs, Committed) and not messages(outputs, SyncCommit)
    (abort,) = messages(outputs, SyncAbort)
    assert abort.tainted and bench.planner.receivers["a"].held_version is None


def test_W2_the_second_worker_of_a_generator_has_to_show_its_bits_too():
    assert kinds(swapped([GOOD, GOOD], workers=2)[1], Committed)
    _, outputs = swapped([GOOD, BitsInUse(0, 9, ["lm_head.weight"], [])], workers=2)
    (failed,) = kinds(outputs, SyncFailed)
    assert "on rank 2" in failed.reason and not kinds(outputs, Committed)


def test_W2_what_only_the_canary_can_prove_is_said_once(caplog):
    left = BitsInUse(0, 8, [], ["model.scale: no loader wrote it"])
    bench, outputs = swapped([left])
    assert kinds(outputs, Committed)
    for version in (1, 2):
        bench.snapshot(version)
        bench.reply("a", "stage")
        bench.broadcast_done()
        assert kinds(bench.reply("a", "swap", in_use=[BitsInUse(version, 8, [], left.not_compared)]), Committed)
    assert caplog.text.count("the canary alone proves them: model.scale: no loader wrote it") == 1


@pytest.mark.parametrize(
    ("differences", "passes"), [([0.04, 0.0], True), ([0.03, 0.03], False), ([0.02, 0.02], True), ([0.11, 0.0], False)]
)
def test_W2_the_canary_has_a_limit_for_the_mean_besides_that_for_the_largest(differences, passes):
    theirs = np.frombuffer(CANARY[0], np.float32) + np.array(differences, np.float32)
    _, outputs = swapped([GOOD], [theirs.tobytes()], tolerance=0.1)
    assert bool(kinds(outputs, Committed)) == passes
    if not passes:
        (failed,) = kinds(outputs, SyncFailed)
        assert ("in the mean, allowed 0.025" in failed.reason) == (max(differences) < 0.1)


DTYPES = [torch.float32, torch.bfloat16]


def swapped_worker(dtype, seed=1):
    """A small model that vLLM's own methods load, at version `seed + 1`, applied in place; and that version."""
    worker = Worker(Model(dtype))
    worker.reload(checkpoint(seed))
    assert report(worker, 1, checkpoint(seed).items()) == BitsInUse(1, 5, [], [])
    named = checkpoint(seed)
    return worker, named


def stepped(named, random):
    """The same a small step later: one element of each tensor, by one place of a bfloat16."""
    out = {}
    for name, tensor in named.items():
        out[name] = tensor.clone()
        index = int(random.integers(tensor.numel() // 2, tensor.numel()))  # the half that the rank holds
        rounded = out[name].view(-1)[index].bfloat16().float()
        out[name].view(-1)[index] = rounded * (1 + 2**-7)
    return out | {"head.weight": out["embed.weight"]}


def is_packed(layer):
    """Whether it computes from a copy of its weight: on a CPU without products of bfloat16 some layers do not."""
    if not layer.weight.numel():
        return True
    probe = torch.ones(1, layer.weight.shape[1], dtype=layer.weight.dtype)
    return layer.cpu_linear(probe, torch.zeros_like(layer.weight), None).any().item()


def stale_places(model):
    """(label, a function that remembers what is computed with and returns one that puts it back)."""

    def of_packed(layer):
        old = layer.cpu_linear
        return lambda: setattr(layer, "cpu_linear", old)

    def of_plain(parameter):
        old = parameter.clone()
        return lambda: parameter.data.copy_(old)

    for label in ("embed", "fused", "head"):
        layer = getattr(model, label)
        of_weight = partial(of_packed, layer) if is_packed(layer) else partial(of_plain, layer.weight)
        yield f"{label}.weight", of_weight
    plain = {"embed.weight": model.embed, "norm.weight": model.norm, "fused.bias": model.fused}
    for label, layer in plain.items():
        yield label, partial(of_plain, getattr(layer, label.partition(".")[2]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("apply", ["direct", "reload"])
def test_W2_a_tensor_that_is_one_element_old_is_found_and_named(dtype, apply):
    worker, named = swapped_worker(dtype)
    random = np.random.default_rng(0)
    for version in range(2, 7):
        for label, remember in stale_places(worker.model):
            old, named = named, stepped(named, random)
            put_back = remember()
            if apply == "direct":
                prepared = worker.prepare(named)
                assert worker.direct.usable(prepared)
                worker.direct.apply(prepared, manifest_of(named))
            else:
                worker.reload(named)
            assert report(worker, version, named.items()).differing == [], "an honest swap"
            put_back()
            found = report(worker, version, named.items())
            assert label in found.differing, (label, found, old.keys())
            worker.reload(named)


def test_W2_every_part_that_a_swap_forgets_is_found():
    """Each copy and each packed layer is left out once; the check owes nothing to the plan that forgot it."""
    worker, named = swapped_worker(torch.float32)
    random = np.random.default_rng(1)
    total = len(worker.prepare(named).copies) + len(worker.prepare(named).packs)
    assert total == 7
    for index in range(total):
        worker.reload(named)
        assert not report(worker, 1, named.items()).differing
        named = stepped(named, random)  # one element: the columns that are read back need not hold it
        prepared = worker.prepare(named)
        (prepared.copies if index < len(prepared.copies) else prepared.packs).pop(index % len(prepared.copies))
        worker.direct.apply(prepared, manifest_of(named))
        assert report(worker, 2, named.items()).differing


def test_W2_a_plan_that_lists_one_write_twice_and_omits_another_is_no_plan():
    worker, _ = swapped_worker(torch.float32)
    (fused,) = [loaded for loaded in worker.direct.in_use.plain if loaded.label == "fused.bias"]
    assert num_unwritten(fused) == 0
    fused.writes["left.bias"], kept = fused.writes["right.bias"], fused.writes["left.bias"]
    assert num_unwritten(fused) == len(worker.model.fused.bias) // 2
    fused.writes["left.bias"] = kept


def test_W2_a_tensor_that_does_not_come_and_constants_that_changed_are_found():
    worker, named = swapped_worker(torch.float32)
    lacking = {name: tensor for name, tensor in named.items() if name != "left.bias"}
    assert report(worker, 1, lacking.items()).differing == ["fused.bias"]
    worker.model.embed.weight.data[-1] = 1.0  # a row that no checkpoint has
    assert "embed.weight" in report(worker, 1, named.items()).differing


def test_W2_a_packed_weight_that_is_not_what_it_was_said_to_be_is_read_back():
    """Packing went wrong and nobody noticed: the columns that are read find it within a few swaps."""
    worker, named = swapped_worker(torch.bfloat16)
    if not is_packed(worker.model.fused):
        worker, named = swapped_worker(torch.float32)
    layer = worker.model.fused
    dtype = layer.bias.dtype
    honest = dict(worker.direct.in_use._ledger)[id(layer)]
    wrong = layer.weight.new_zeros(2 * layer.rows, HIDDEN) if layer.weight.numel() else torch.zeros(HIDDEN, HIDDEN)
    assert is_packed(layer)
    (pack,) = [pack for pack in worker.direct.in_use.packs if pack.layer is layer]
    packed = pack.packed(wrong.to(dtype))
    layer.cpu_linear = packed.linear
    worker.direct.in_use.note_packed(layer, packed._replace(weight_digest=honest.weight_digest))
    assert report(worker, 1, named.items()).differing == ["fused.weight"]


def test_W2_no_layer_computes_in_the_thread_beside_generation():
    """A packed layer that computes in two threads at once spoils both results, and the heap."""
    worker, named = swapped_worker(torch.float32)
    worker.direct.read_packed()

    def computes(*_):
        raise AssertionError("a layer computed beside generation")

    assert worker.direct.in_use.packs
    for pack in worker.direct.in_use.packs:
        pack.layer.cpu_linear = computes
    assert worker.direct.report(1, named.items()).differing == []


def test_W2_the_sign_of_zero_and_not_a_number_are_bits():
    worker, named = swapped_worker(torch.float32)
    named["norm.weight"][0] = 0.0
    worker.reload(named)
    worker.model.norm.weight.data[0] = -0.0
    assert report(worker, 1, named.items()).differing == ["norm.weight"]
    named["norm.weight"][0] = float("nan")
    worker.reload(named)
    assert report(worker, 1, named.items()).differing == []


# -- heads ------------------------------------------------------------------------------------------------------------


def model_with_head(folder, *, tied, head):
    """A tiny model folder whose config.json says `tied`; `head`: "same" as the embedding, "other", or "none" stored."""
    save_tiny_model(folder, tied=True)
    weights = load_file(folder / "model.safetensors")
    if head != "none":
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"] + float(head == "other")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config.pop("tie_word_embeddings", None)
    config |= {} if tied is None else {"tie_word_embeddings": tied}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    ("tied", "head", "cause"),
    [
        (True, "other", "tie_word_embeddings is true, but a head of its own is stored: lm_head.weight"),
        (False, "none", "tie_word_embeddings is false, but no lm_head.weight is stored"),
        (None, "none", r"tie_word_embeddings is false \(the default of its kind\), but no lm_head.weight"),
    ],
)
def test_D11_a_head_that_config_json_denies_is_refused_by_both_sides_and_the_dry_run(tied, head, cause, tmp_path):
    folder = model_with_head(tmp_path / "model", tied=tied, head=head)
    with pytest.raises(ModelError, match=cause):
        Policy.load(str(folder))
    config = load_config(None, [f"model.path={folder}", "task.path=asyncrl.tasks.arithmetic:Arithmetic"])
    for role in ("learner", "generator"):
        with pytest.raises(ModelError, match=f"model.path=.*{cause}.*config.json"):
            check_host(config, role)


@pytest.mark.parametrize(("tied", "head"), [(True, "none"), (True, "same"), (False, "other"), (False, "same")])
def test_D11_heads_that_config_json_confirms_are_loaded(tied, head, tmp_path):
    folder = model_with_head(tmp_path / "model", tied=tied, head=head)
    check_head(find_model(str(folder)), "model.path=x")
    policy = Policy.load(str(folder))
    assert (policy.head_weight is policy.model.get_input_embeddings().weight) == tied


# -- the port of the weight channels ----------------------------------------------------------------------------------


def test_U5_a_weights_port_that_is_in_use_is_refused_before_anything_starts(tmp_path):
    folder = save_tiny_model(tmp_path / "model")
    keys = [f"model.path={folder}", "model.max_length=512", "task.path=asyncrl.tasks.arithmetic:Arithmetic"]
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        config = load_config(None, [*keys, f"weights.port={port}"])
        told = (
            f"weights.port={port} cannot be had at weights.host=127.0.0.1: Address already in use; choose a free port"
        )
        with pytest.raises(ConfigError, match=told):
            check_host(config, "learner")
        check_host(config, "generator")  # which only connects there
        with pytest.raises(BindError, match=str(port)):
            WeightStore("127.0.0.1", port)
    check_host(config, "learner")


@pytest.mark.parametrize("value", ["-1", "65536"])
def test_U5_no_port_is_none(value):
    with pytest.raises(ConfigError, match="weights.port"):
        load_config(None, [f"weights.port={value}"])


def test_U5_all_channels_meet_at_the_port_that_was_set():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    store = WeightStore("127.0.0.1", port)
    spec = ChannelSpec("127.0.0.1", 0, "", 0, 2, "gloo", 10.0)
    for epoch in range(3):  # the second and third one after the first was closed
        root = WeightChannel.host(replace(spec, prefix=f"run/{epoch}"), shared_store=store)
        assert root.store_port == port
        member = WeightChannel(root.spec.for_rank(1))
        with ThreadPoolExecutor() as pool:
            list(pool.map(lambda channel: channel.join(), (root, member)))
            sent, received = torch.arange(8, dtype=torch.uint8), torch.zeros(8, dtype=torch.uint8)
            parts = ((root, [sent]), (member, [received]))
            list(pool.map(lambda pair: pair[0].broadcast(pair[1], 10.0), parts))
        assert torch.equal(sent, received)
        root.close()
        member.close()
    store.close()


def own_tcp_sockets() -> set[tuple[str, str, int]]:
    """(state, address as the kernel writes it, local port) of the TCP sockets over IPv4 of this process."""
    inodes = set()
    for fd in Path("/proc/self/fd").iterdir():
        with suppress(OSError):  # closed in between
            inodes.add(os.readlink(fd).removeprefix("socket:[").removesuffix("]"))
    rows = [line.split() for line in Path("/proc/self/net/tcp").read_text().splitlines()[1:]]
    return {(row[3], row[1].split(":")[0], int(row[1].split(":")[1], 16)) for row in rows if row[9] in inodes}


def test_U5_each_member_listens_for_the_bytes_within_the_kernels_range_on_the_way_to_the_learner(monkeypatch):
    """What weights/README.md says of firewalls: no other port is used, and no other interface."""
    listening, loopback = "0A", "0100007F"
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "nowhere0")  # is not asked
    least, most = map(int, Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split())
    store = WeightStore("127.0.0.1", 0)
    before = own_tcp_sockets()
    spec = ChannelSpec("127.0.0.1", store.port, "run/1", 0, 3, "gloo", 10.0)
    channels = [WeightChannel.host(spec, shared_store=store), *(WeightChannel(spec.for_rank(n)) for n in (1, 2))]
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda channel: channel.join(), channels))
    opened = own_tcp_sockets() - before
    ports = {port for _, address, port in opened if address == loopback}
    assert len(ports) == len({port for _, _, port in opened})
    assert all(least <= port <= most for port in ports - {store.port})
    assert sum(state == listening for state, _, _ in opened) == 3
    for channel in channels:
        channel.close()
    store.close()


@pytest.mark.parametrize("backend", ["gloo", "ipc"])
def test_U5_the_publisher_opens_its_channels_at_the_port(backend):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    buffer = SnapshotBuffer([("w", torch.zeros(4))], 1024, shared=backend == "ipc")
    publisher = Publisher("inproc://x", buffer, [], host="127.0.0.1", port=port)
    opened = [publisher._open(OpenChannel(epoch, f"run/{epoch}", 2, 5.0, backend)) for epoch in (1, 2)]
    assert not any(ready.error for ready in opened)
    ports = {ready.port for ready in opened}
    assert ports == {port} if backend == "gloo" else port not in ports
    for epoch in (1, 2):
        publisher._close(epoch)


# -- mixtures of experts ----------------------------------------------------------------------------------------------


@pytest.fixture
def experts(tmp_path):
    """A Qwen3-MoE as it is loaded from a folder, and the names of the tensors there."""
    model = Qwen3MoeForCausalLM(expert_config())
    model.save_pretrained(tmp_path / "experts")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "experts", dtype=torch.float32)
    return loaded, load_file(tmp_path / "experts" / "model.safetensors")


def test_D10_a_second_path_to_a_layer_is_carried_with_the_first_and_a_tied_layer_is_not():
    gate, block, root = torch.nn.Linear(2, 2), torch.nn.Module(), torch.nn.Module()
    block.gate = root.gate = gate
    root.experts, root.embed, root.head = block, torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    root.head.weight = root.embed.weight
    names = dict(aliases(root))
    assert names["experts.gate.weight"] == names["gate.weight"]
    assert names["head.weight"] != names["embed.weight"]


def test_D10_adapters_leave_the_experts_out_say_so_and_name_frozen_tensors_as_files_do(experts, caplog):
    model, stored = experts
    apply_update(model, UpdateConfig(what="lora", lora_rank=2))
    assert caplog.text.count("4 weights of experts") == 1
    source = patched_source(model, UpdateConfig(what="lora", lora_rank=2), frozen_digests(model))
    assert dict(source.patch.base) == {name: digest(tensor) for name, tensor in stored.items()}


def test_D10_a_part_that_files_hold_in_pieces_is_refused(experts):
    model, _ = experts
    with pytest.raises(ConfigError, match="mlp.experts.down_proj is stored in several tensors"):
        apply_update(model, UpdateConfig(what="partial", names=["model.layers.0.mlp.experts.down_proj"]))
    apply_update(model, UpdateConfig(what="partial", names=["model.layers.0.mlp.gate.weight"]))
