"""The desk's parts put together for tests: the real ones, except that prompts come without a tokenizer.

Groups as the journal holds them are made by `tests.replay.replay_making`.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from asyncrl.config import Config
from asyncrl.desk.acknowledgements import Acknowledgements
from asyncrl.desk.counters import Counters, RunTotals
from asyncrl.desk.intake import Intake, Taken
from asyncrl.desk.prompts import LeasedPrompts, MadeAtOnce
from asyncrl.desk.proofs import Proofs
from asyncrl.desk.run_state import PolicyVersions, RunState
from asyncrl.link import messages
from asyncrl.link.codec import encode_body
from asyncrl.link.desk_session import DeskSession, DeskSessions, Expected
from asyncrl.link.rollouts import group_to_result
from asyncrl.link.schema.message_base import Message
from asyncrl.metrics import EvalMetrics, StepMetrics, SyncMetrics
from asyncrl.replay.buffer import ReplayBuffer
from asyncrl.replay.lease_book import LeaseBook
from asyncrl.replay.pacing import Pacing
from asyncrl.report.rollouts.jobs import RolloutJob
from asyncrl.storage.journal import Journal
from asyncrl.tasks.prompts import Prompt
from asyncrl.types import FinishReason, Group, LeaseKey, LeaseKind, Rollout, VersionSpan

VOCAB = 50
MEBIBYTE = 2**20


class MetricsLog:
    """Takes what would go to metrics.jsonl."""

    def __init__(self) -> None:
        self.steps: list[StepMetrics] = []
        self.evals: list[EvalMetrics] = []
        self.syncs: list[SyncMetrics] = []
        self.log_step = self.steps.append
        self.log_eval = self.evals.append
        self.log_sync = self.syncs.append


class RolloutJobs:
    """Takes what would be written to run.dir/rollouts."""

    def __init__(self) -> None:
        self.jobs: list[RolloutJob] = []
        self.write = self.jobs.append


class Prompts:
    """Prompt n is [n, n]."""

    def train(self, ordinal: int) -> Prompt:
        return Prompt(np.array([ordinal, ordinal], dtype=np.int32), {"index": ordinal})


def small_config(**changes: Any) -> Config:
    """Steps of 2 groups of 4 rollouts of at most 6 tokens; `section__key=value` changes one key."""
    config = Config()
    config.run.steps, config.learner.groups_per_step = 5, 2
    config.sampling.group_size, config.sampling.max_new_tokens = 4, 6
    config.staleness.max_age = 1
    config.task.path = "tests:Task"
    for name, value in changes.items():
        section, key = name.split("__")
        setattr(getattr(config, section), key, value)
    return config


def hello(name: str, incarnation: int = 1, num_workers: int = 1) -> messages.Hello:
    return messages.Hello(
        protocol=messages.PROTOCOL_VERSION,
        generator_id=name,
        incarnation=incarnation,
        max_run_epoch=0,
        model_fingerprint="model",
        tokenizer_fingerprint="tokenizer",
        task="tests:Task",
        num_workers=num_workers,
        first_unacked_seq=1,
        instance=f"{name}.{incarnation}",
    )


def beat(run_epoch: int = 1, **changes: Any) -> messages.Beat:
    values: dict[str, Any] = {
        "run_epoch": run_epoch,
        "sequences_wanted": 0,
        "active": [],
        "tokens_generated": 0,
        "rollouts_completed": 0,
        "rewards_failed": 0,
        "busy_s": 0.0,
        "idle_s": 0.0,
        "outbox_bytes": 0,
    }
    return messages.Beat(**values | changes)


@dataclass
class Parts:
    """The state of a run, and the parts that take results in."""

    config: Config
    state: RunState
    prompts: LeasedPrompts
    proofs: Proofs
    acknowledgements: Acknowledgements
    intake: Intake

    @property
    def leases(self) -> LeaseBook:
        return self.state.leases

    @property
    def buffer(self) -> ReplayBuffer:
        return self.state.buffer

    @property
    def journal(self) -> Journal:
        return self.state.journal

    @property
    def sessions(self) -> DeskSessions:
        return self.state.sessions

    @property
    def totals(self) -> RunTotals:
        return self.state.counters.totals

    def connect(self, name: str = "g1", now: float = 0.0) -> DeskSession:
        admission = self.sessions.hello(name.encode(), hello(name), version=0, now=now)
        assert admission.session is not None
        self.proofs.add(name, 1, 0)
        return admission.session

    def take(self, session: DeskSession, group: Group, seq: int, now: float = 0.0) -> Taken:
        """Hands in a group as if it came over the wire, with the ticket of its lease."""
        result = group_to_result(group, seq, self.state.run_epoch, self.ticket(session, group.key))
        return self.intake.group(session, result, encode_body(result), now)

    def failed(self, session: DeskSession, message: messages.LeaseFailed, now: float = 0.0) -> Taken:
        """Hands in a failure as if it came over the wire, with the ticket of its lease."""
        with_ticket = dataclasses.replace(message, ticket=self.ticket(session, message.key))
        return self.intake.failed(session, with_ticket, 100, now)

    def ticket(self, session: DeskSession, key: LeaseKey, issued_version: int = 0) -> bytes:
        """What the grant of this lease to this generator carried."""
        return self.state.tickets.issue(key, issued_version, session.generator_id, session.incarnation)

    def deliver(self, session: DeskSession, group: Group, seq: int, now: float = 0.0) -> Message | None:
        """As `take`; returns what the sender is told at once."""
        return self.take(session, group, seq, now).reply

    def make_durable(self) -> list[DeskSession]:
        """Everything taken so far; returns the sessions to acknowledge."""
        self.acknowledgements.make_durable()
        return self.acknowledgements.take_sessions()


def make_parts(
    folder: Path,
    config: Config | None = None,
    run_epoch: int = 1,
    flush: Callable[[int], None] = os.fdatasync,
    num_evals: int = 3,
    credit_bytes: int = MEBIBYTE,
) -> Parts:
    config = config or small_config()
    pacing = Pacing(config.learner.groups_per_step, config.staleness.max_age, config.run.steps)
    state = RunState(
        run_epoch=run_epoch,
        policy=PolicyVersions(),
        leases=LeaseBook(pacing, config.generator.lease_timeout_s, run_epoch),
        buffer=ReplayBuffer(pacing, config.staleness.over_age),
        journal=Journal.open(folder / "journal", flush=flush),
        sessions=DeskSessions(
            run_epoch=run_epoch,
            run_name="run",
            expected=Expected("model", "tokenizer", "tests:Task"),
            credit_bytes=credit_bytes,
            max_frame_bytes=MEBIBYTE,
        ),
        counters=Counters(),
        evals_done=set(),
    )
    evals = [Prompt(np.array([40 + index], dtype=np.int32), {"index": -1}) for index in range(num_evals)]
    prompts = LeasedPrompts(MadeAtOnce(Prompts(), evals), state.leases)
    proofs = Proofs(state.policy)
    acknowledgements = Acknowledgements(state.journal, state.sessions, state.counters)
    intake = Intake(
        config,
        vocab_size=VOCAB,
        state=state,
        prompts=prompts,
        proofs=proofs,
        acknowledgements=acknowledgements,
    )
    return Parts(config, state, prompts, proofs, acknowledgements, intake)


def make_rollout(reward: float = 1.0, version: int = 0, num_tokens: int = 3) -> Rollout:
    return Rollout(
        token_ids=np.arange(num_tokens, dtype=np.int32),
        behaviour_logprobs=np.full(num_tokens, -1.0, dtype=np.float32),
        version_spans=(VersionSpan(0, num_tokens, version),),
        finish_reason=FinishReason.STOP,
        reward=reward,
        reward_parts={"exact": reward},
    )


def train_group(ordinal: int, attempt: int = 0, *, num_rollouts: int = 4, version: int = 0) -> Group:
    """What a generator makes of the lease of `ordinal`."""
    key = LeaseKey(LeaseKind.TRAIN, ordinal, attempt)
    rollouts = [make_rollout(float(index), version) for index in range(num_rollouts)]
    return Group(key, np.array([ordinal, ordinal], dtype=np.int32), rollouts)


def flat_group(ordinal: int, attempt: int = 0, *, version: int = 0) -> Group:
    """As `train_group`, with equal rewards."""
    group = train_group(ordinal, attempt, version=version)
    for rollout in group.rollouts:
        rollout.reward = 1.0
        rollout.reward_parts = {"exact": 1.0}
    return group


def eval_group(ordinal: int, prompt: int, *, version: int = 0, reward: float = 1.0, attempt: int = 0) -> Group:
    key = LeaseKey(LeaseKind.EVAL, ordinal, attempt)
    return Group(key, np.array([prompt], dtype=np.int32), [make_rollout(reward, version)])
