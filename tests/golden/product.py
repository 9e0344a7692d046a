"""Everything the golden tests use of asyncrl, behind functions that return plain values.

The stored data pins behaviour, not names: when a module moves or a class is renamed, this file follows, and the tests
and their data stay as they are.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import torch

from asyncrl.cli.common import command
from asyncrl.config.loading import load_config
from asyncrl.link import codec, messages, trainer_messages, wire_types
from asyncrl.link.rollouts import group_to_result, result_to_group
from asyncrl.link.schema.message_base import message_types
from asyncrl.link.weight_records import (
    BitsInUse,
    ChannelPlace,
    DeltaInfo,
    Patch,
    Placement,
    TensorEntry,
    WeightLayout,
    WeightManifest,
)
from asyncrl.replay.recovery import replay_plan
from asyncrl.storage import records, segment
from asyncrl.storage.checkpoint_files import read_manifest
from asyncrl.storage.journal import Journal
from asyncrl.storage.run_epoch import next_run_epoch, run_epoch_of
from asyncrl.trainer.checkpoint import load_checkpoint, save_checkpoint
from asyncrl.trainer.critic import Critic
from asyncrl.trainer.engines.part import names_by_number
from asyncrl.trainer.engines.policy import Policy
from asyncrl.trainer.engines.single import SingleCriticEngine, SinglePolicyEngine, engines_for
from asyncrl.trainer.engines.trainable import apply_update
from asyncrl.trainer.step import StepRunner
from asyncrl.types import FinishReason, Frontier, Group, LeaseKey, LeaseKind, Rollout, Setting, VersionSpan
from tests.golden.float64_model import fill, float64_qwen2, qwen2

MAX_FRAME_BYTES = 2**20

# -- training steps

SETTINGS = [
    "model.path=unused",
    "model.max_length=32",
    "sampling.max_new_tokens=16",
    "learner.lr=0.01",
    "learner.micro_batch_tokens=64",
    "learner.grad_clip=0.5",
    "critic.lr=0.02",
]
METHODS = {
    "grpo": ["algorithm.name=grpo"],
    "ppo": ["algorithm.name=ppo"],
    "decoupled": ["algorithm.name=decoupled", "learner.epochs=2", "learner.mini_batches=2"],
    "lora": ["update.what=lora", "update.lora_rank=2", "update.lora_alpha=4", "algorithm.kl_coef=0.1"],
}


def new_trainer(method: str, *, version: int) -> StepRunner:
    """A trainer of `version` that computes in float64; the same weights at every call."""
    config = load_config(None, [*SETTINGS, *METHODS[method]])
    model = float64_qwen2()
    apply_update(model, config.update)
    model.double()
    fill(model, seed=1)
    policy = Policy(model)
    policy.update = config.update
    reference = policy.initial_policy() if config.algorithm.kl_coef > 0 else None
    critic = None
    if config.algorithm.advantage == "gae":
        critic = new_critic(float64_qwen2(layers=1), hidden=16, seed=2).double()
        fill(critic, seed=2)
    return StepRunner(engines_for(policy, config, reference=reference, critic=critic), config, version=version)


def new_critic(model: Any, *, hidden: int, seed: int) -> Critic:
    critic = Critic(model.base_model, hidden, dtype="float32", device=torch.device("cpu"))
    fill(critic, seed)
    return critic


def train(trainer: StepRunner, groups: list[Group]) -> dict[str, float]:
    """One step; what it measured."""
    return trainer.step(groups).metrics


def trained_weights(trainer: StepRunner) -> dict[str, np.ndarray]:
    """Copies of what is trained, by name; the critic's names begin with `critic.`."""
    weights = {name: tensor.numpy().copy() for name, tensor in _policy(trainer).trained_tensors().items()}
    engine = trainer.engines.critic
    if engine is not None:
        assert isinstance(engine, SingleCriticEngine)
        critic = engine.critic.named_parameters()
        weights |= {f"critic.{name}": value.detach().numpy().copy() for name, value in critic}
    return weights


def score(trainer: StepRunner, tokens: Iterable[int]) -> np.ndarray:
    """Log-prob of each token after the first."""
    return _policy(trainer).score([list(tokens)])[0]


def _policy(trainer: StepRunner) -> Policy:
    assert isinstance(trainer.engines.actor, SinglePolicyEngine)
    return trainer.engines.actor.policy


# -- groups and the journal


def make_group(
    ordinal: int, attempt: int, prompt: Any, rollouts: list[dict[str, Any]], baseline: float | None
) -> Group:
    """A training group; spans of a rollout are (start, stop, version)."""
    made = [
        Rollout(
            token_ids=np.asarray(rollout["tokens"], dtype=np.int32),
            behaviour_logprobs=np.asarray(rollout["logprobs"], dtype=np.float32),
            version_spans=tuple(VersionSpan(*span) for span in rollout["spans"]),
            finish_reason=FinishReason(rollout["finish"]),
            reward=rollout["reward"],
            reward_parts=rollout["parts"],
        )
        for rollout in rollouts
    ]
    return Group(LeaseKey(LeaseKind.TRAIN, ordinal, attempt), np.asarray(prompt, dtype=np.int32), made, baseline)


def group_values(group: Group) -> dict[str, Any]:
    """A group as JSON has it."""
    return {
        "key": list(group.key),
        "prompt": group.prompt_token_ids.tolist(),
        "baseline": group.baseline_reward,
        "rollouts": [
            {
                "tokens": rollout.token_ids.tolist(),
                "logprobs": rollout.behaviour_logprobs.tolist(),
                "spans": [[span.start, span.stop, span.version] for span in rollout.version_spans],
                "finish": rollout.finish_reason.value,
                "reward": rollout.reward,
                "parts": rollout.reward_parts,
            }
            for rollout in group.rollouts
        ],
    }


def stored_group(group: Group, *, generator_id: str = "gen-a", incarnation: int = 2, seq: int) -> Any:
    """The journal's record of a group that came as message `seq`, before results carried tickets."""
    body = msgpack.packb(msgpack.unpackb(codec.encode_body(group_to_result(group, seq=seq, run_epoch=3)))[:-1])
    return records.StoredGroup(
        generator_id=generator_id,
        incarnation=incarnation,
        seq=seq,
        ordinal=group.key.ordinal,
        attempt=group.key.attempt,
        issued_version=group.oldest_version,
        oldest_version=group.oldest_version,
        newest_version=max(rollout.newest_version for rollout in group.rollouts),
        num_tokens=tuple(rollout.num_tokens for rollout in group.rollouts),
        body=body,
    )


def step_taken(version: int, groups: list[tuple[int, int]]) -> Any:
    """The journal's record of the batch that makes `version` + 1."""
    return records.StepTaken(version, tuple(groups))


def other_records(seq: int, ordinal: int) -> list[Any]:
    """A record of each kind that is neither a group nor a step."""
    return [
        records.MessageSeen("gen-b", 7, seq),
        records.GroupsDropped(((ordinal, 0), (ordinal + 1, 3))),
        records.PromptGivenUp(ordinal + 2),
        records.GroupFiltered("gen-b", 7, seq + 1, ordinal + 3, 1),
        records.RunStarted(4),
        records.BatchSkipped(6, ((ordinal + 4, 0), (ordinal + 5, 2)), "the trainer died 4 times"),
        records.GeneratorAdmitted("gen-b", 8, "0f" * 16),
    ]


def record_kinds() -> set[int]:
    """The kind byte of every record there is."""
    return {int(kind) for kind in records.RecordKind}


def record_kind(record: Any) -> int:
    return int(record.kind)


def record_values(record: Any) -> list[Any]:
    """Kind and fields of a record as JSON has them; a reason, which came later, only where there is one."""
    names = [field.name for field in fields(record) if field.name != "reason" or record.reason]
    return [record_kind(record), *(_plain(getattr(record, name)) for name in names)]


def encode_record(record: Any, salt: int) -> bytes:
    """The bytes of a record in a segment with this salt."""
    return segment.encode(record, salt)


def decode_record(data: bytes, salt: int) -> Any:
    """Undoes `encode_record`; fails unless the record takes all of `data`."""
    whole = segment.whole_record(data, 0, salt)
    assert whole is not None and whole[0] == len(data), "no whole record"
    return whole[1]


def write_journal(folder: Path, entries: Iterable[Any], segment_bytes: int = 2**20) -> None:
    """A journal folder that holds these records."""
    with contextlib.closing(Journal.open(folder, segment_bytes)) as journal:
        for record in entries:
            journal.append(record, now=0.0)
        journal.make_durable()


def read_journal(folder: Path) -> list[Any]:
    """All records of a journal folder. Locks it and may repair it: read a copy."""
    with contextlib.closing(Journal.open(folder)) as journal:
        assert not journal.damage and not journal.torn_bytes
        return [entry.record for entry in journal.read_all()]


def groups_of(entries: Iterable[Any]) -> dict[tuple[int, int], Group]:
    """The groups among records, by ordinal and attempt."""
    stored = [record for record in entries if isinstance(record, records.StoredGroup)]
    return {
        (record.ordinal, record.attempt): result_to_group(codec.decode_body(messages.GroupResult, record.body))
        for record in stored
    }


def batches_of(entries: list[Any]) -> Iterator[tuple[int, list[Group]]]:
    """(version, groups) of each step among records."""
    groups = groups_of(entries)
    for record in entries:
        if isinstance(record, records.StepTaken):
            yield record.version, [groups[key] for key in record.groups]


def recovery_values(folder: Path, version: int) -> dict[str, Any]:
    """What a learner that resumes from `version` does with a journal, as JSON has it."""
    with contextlib.closing(Journal.open(folder)) as journal:
        plan = replay_plan(version, Frontier(), journal.read_all())
    return {
        "steps": [[step.version, _plain(step.groups)] for step in plan.steps],
        "buffered": [[group.ordinal, group.attempt] for group in plan.buffered],
        "given_up": plan.given_up,
        "filtered": plan.filtered,
        "seen": [[*key, sorted(seqs)] for key, seqs in sorted(plan.seen.items())],
        "broken_at": plan.broken_at,
    }


def start_run(run_dir: Path) -> int:
    """Counts one more start of a learner."""
    return next_run_epoch(run_dir)


def starts_of(run_dir: Path) -> int:
    return run_epoch_of(run_dir)


def _plain(value: Any) -> Any:
    if isinstance(value, bytes):
        return value.hex()
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


# -- checkpoints


def small_trainer(*, seed: int, version: int) -> StepRunner:
    """A float32 trainer with a critic whose checkpoint takes little room."""
    config = load_config(None, [*SETTINGS, *METHODS["ppo"]])
    model = qwen2(hidden=8, layers=1)
    fill(model, seed)
    critic = new_critic(qwen2(hidden=8, layers=1), hidden=8, seed=seed + 1)
    return StepRunner(engines_for(Policy(model), config, critic=critic), config, version=version)


def save(root: Path, trainer: StepRunner, *, run_epoch: int, desk_state: bytes) -> Path:
    return save_checkpoint(root, trainer, run_epoch=run_epoch, desk_state=desk_state)


def restore(root: Path, trainer: StepRunner) -> dict[str, Any] | None:
    """Loads the newest checkpoint that verifies; what it says of itself, as JSON has it."""
    restored = load_checkpoint(root, trainer)
    if restored is None:
        return None
    return {
        "folder": restored.path.name,
        "version": trainer.version,
        "run_epoch": restored.run_epoch,
        "desk_state": restored.desk_state.hex(),
    }


def manifest_values(folder: Path) -> dict[str, Any]:
    """What the manifest of a checkpoint says, once every file was compared with its digest."""
    manifest = read_manifest(folder)
    files = {name: list(entry) for name, entry in sorted(manifest.files.items())}
    return {"version": manifest.version, "run_epoch": manifest.run_epoch, "files": files, "extra": manifest.extra}


def optimizer_values(trainer: StepRunner) -> dict[str, np.ndarray]:
    """Copies of both optimizers' state, by optimizer, parameter number and name."""
    state, values = trainer.engines.state(), {}
    for which, part in (("optimizer", state.policy), ("critic_optimizer", state.critic)):
        assert part is not None
        for number, parameter in enumerate(names_by_number(part)):
            tensors = part.optimizer[parameter]
            values |= {f"{which}.{number}.{name}": tensor.numpy().copy() for name, tensor in tensors.items()}
    return values


# -- messages


def message_codes() -> set[int]:
    """The code of every message there is."""
    return set(message_types())


def message_code(message: Any) -> int:
    return message.wire_code


def encode_message(message: Any) -> bytes:
    return codec.encode(message, max_bytes=MAX_FRAME_BYTES)


def decode_message(frame: bytes) -> Any:
    return codec.decode(frame, max_bytes=MAX_FRAME_BYTES)


def fields_left_at_default(message: Any) -> list[str]:
    """Names of optional fields that hold their default, and of containers that are empty."""
    left = []
    for field in fields(message):
        value = getattr(message, field.name)
        if value == field.default or value in ("", b"", [], {}):
            left.append(field.name)
    return left


def example_group(ordinal: int) -> Group:
    """A group of two completions over several versions."""
    rollouts = [
        {
            "tokens": [5, 39, 1],
            "logprobs": [-0.5, -1.25, -0.0625],
            "spans": [(0, 1, 3), (1, 3, 5)],
            "finish": "stop",
            "reward": 1.25,
            "parts": {"exact": 1.0, "format": 0.25},
        },
        {
            "tokens": [7, 8],
            "logprobs": [-3.0, -2.5],
            "spans": [(0, 2, 4)],
            "finish": "length",
            "reward": -0.5,
            "parts": {"exact": 0.0, "format": -0.5},
        },
    ]
    return make_group(ordinal, 1, [2, 3, 4, 39], rollouts, 0.75)


def example_records() -> list[Any]:
    """One record of each kind."""
    group = stored_group(example_group(11), seq=90)
    return [group, step_taken(5, [(11, 1), (12, 0)]), *other_records(seq=91, ordinal=20)]


def example_messages() -> list[Any]:
    """One message of each class, as a run would send it, with every field filled."""
    ids = np.arange(1, 5, dtype="<i4").tobytes()
    logprobs = np.array([-0.5, -1.5, -2.25], dtype="<f4").tobytes()
    place = ChannelPlace(4, "10.0.0.1", 40123, "run/3/4", 1, 3, "gloo")
    delta = DeltaInfo(base_version=6, num_bytes=640, digest=-(2**62), piece_words=1 << 18)
    manifest = _example_manifest(delta)
    result = group_to_result(example_group(11), seq=90, run_epoch=3, ticket=b"ticket of 11.1")
    m, train, evaluate = messages, LeaseKind.TRAIN, LeaseKind.EVAL
    return [
        m.Hello(
            4, "gen-a", 2, 3, "0123456789abcdef", "fedcba9876543210", "own.module:Task", 2, 17, 6, "7f3a",
            [Setting("reward.weights", '{"exact": 2.0}'), Setting("file own.module (source)", "00112233aabbccdd")],
            Placement("boot-of-a-host", "1000@4026531836", ("c0ffee00-0000-4000-8000-000000000001",)),
        ),
        m.Beat(
            3, 640, [m.ActiveLease(train, 11, 1, 5), m.ActiveLease(evaluate, 2, 0, 6), m.ActiveLease(train, 12, 0)],
            123_456, 789, 3, 512.5, 7.25, 65_536, 6, 4, False, 632, [b"ticket of 11.1", b"ticket of 2.0"],
            {"decode": 500.25, "swap": 12.25}, {"fixed": 2.5, "sequence": 0.125}, 640.5,
        ),
        result,
        m.LeaseFailed(
            91, 3, evaluate, 2, 1, wire_types.FailureReason.REWARD_TIMEOUT, "no reward after 10 s", b"ticket of 2.1"
        ),
        m.SyncReply(
            3, 7, 2, wire_types.SyncPhase.STAGE, "a peer vanished", [[1, -2], [3, 2**62]], [logprobs], {"load": 3.0},
            [BitsInUse(7, 26, ["model.norm.weight"], ["lm_head.weight: no loader wrote it"])],
        ),
        m.Bye("SIGTERM"),
        m.Welcome(3, "quickstart", 6, 64 * 2**20, 89, 1.0, 32 * 2**20),
        m.Refusal(wire_types.RefusalCode.MODEL, "another model", "0123456789abcdef", "aaaaaaaaaaaaaaaa"),
        m.LeaseGrant(
            3, train, 11, 1, 5, 600.0, ids, {"answer": "42", "marks": [1.0, 0.5], "extra": {"level": 2, "key": None}},
            8, 128, 0.75, 5, 2**40 + 1, True, b"ticket of 11.1", "What is 6 x 7?",
        ),
        m.Ack(3, 90, [92, 95], 2**20, 5.0),
        m.Nack(3, 93, wire_types.NackCode.INVALID, "group train 11: prompt of 3 tokens is not the leased one"),
        m.SyncOffer(3, 7, 2, place, manifest, 30.0),
        m.SyncSwap(3, 7, 2, [ids, ids[:8]], 30.0),
        m.SyncCommit(3, 7, 2),
        m.SyncAbort(3, 7, 2, "canary differs", True),
        m.Stop(3, True, "all steps are trained"),
        m.Abandon(3, [LeaseKey(train, 11, 1), LeaseKey(evaluate, 2, 0)]),
        trainer_messages.TrainerHello(1, 2, 6, 4321, Placement("boot-of-a-host", "1000@4026531836", ("c0ffee00",))),
        trainer_messages.BatchRequest(1, 6),
        trainer_messages.StepDone(
            7, {"loss": -0.125, "grad_norm": 1.5, "age/0/tokens": 96.0}, 2.5, {"compute": 2.25, "data": 0.25}
        ),
        trainer_messages.StepRollouts(7, [11, 12], [b"\x81\xa4name\x01", b"\x80"]),
        trainer_messages.SnapshotReady(7, manifest, [ids, ids[:8]], [logprobs, logprobs[:4]], 8.5, delta),
        trainer_messages.ChannelReady(4, "10.0.0.1", 40123, "address in use", "nccl", 6),
        trainer_messages.BroadcastDone(7, 2, 4, "a peer vanished", 42.5, 640, 3072, 1.75),
        trainer_messages.CheckpointDone(7, "runs/quickstart/checkpoints/step_7", "disk full", 1.5),
        trainer_messages.TrainerWelcome(3, 6),
        trainer_messages.Batch(6, 1, [codec.encode_body(result)], b"\x81\xa4next\x0d", True, True),
        trainer_messages.OpenChannel(4, "run/3/cell/2", 3, 30.0, "nccl"),
        trainer_messages.Broadcast(7, 2, 4, 30.0, 6),
        trainer_messages.TrainerStop(True, True, "all steps are trained"),
        trainer_messages.SnapshotWanted(6, [3, 4]),
        trainer_messages.CloseChannel(3),
        trainer_messages.SenderHello(1, b"a token"),
        trainer_messages.ShardReady(7, [123, -456], delta, 2.5),
        trainer_messages.ShardSent(7, 2, 4, "a peer vanished", 42.5, 320),
        trainer_messages.PrepareShard(7, 2, 1, [0, 3]),
        trainer_messages.JoinChannel(ChannelPlace(4, "10.0.0.1", 40123, "run/3/4", 1, 4, "gloo", 2), 30.0),
        trainer_messages.SendShard(7, 2, 4, 1, 30.0, delta),
    ]  # fmt: skip


def _example_manifest(delta: DeltaInfo) -> WeightManifest:
    layout = WeightLayout(
        total_bytes=2624,
        tensors=(
            TensorEntry("model.layers.0.self_attn.q_proj.lora_A.weight", "float32", (2, 16), 0),
            TensorEntry("model.embed_tokens.weight", "bfloat16", (40, 32), 64),
            TensorEntry("lm_head.weight", "bfloat16", (40, 32), 64),
        ),
        ranges=((0, 2048), (2048, 2624)),
    )
    patch = Patch((("model.norm.weight", -5), ("model.other", 2**62)), (("model.tied", "model.other"),), 2.0)
    return WeightManifest(7, layout, (123, -456), patch, delta)


# -- commands


def run_dry(role: str, arguments: list[str]) -> tuple[int, str]:
    """Exit code and output of a command with `--dry-run`."""
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        code = command(role, [*arguments, "--dry-run"], None)
    return code, output.getvalue()
