"""The desk's end of the sessions: admission, deduplication, liveness. No sockets, no clock, no journal.

A result is settled once it is durable, or refused for good. The seqs of settled results must survive the learner
together with the results: `state` goes into the checkpoint, `replay` repeats what the journal has since. How both ends
of a session work together is in link/README.md.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from asyncrl.host.deadlines import Deadlines
from asyncrl.host.fingerprints import differences
from asyncrl.link import limits
from asyncrl.link.messages import PROTOCOL_VERSION, Ack, Beat, Hello, Nack, Refusal, Welcome
from asyncrl.link.wire_types import NackCode, RefusalCode
from asyncrl.types import Frontier, Setting


class Seen(StrEnum):
    """What to do with a result that arrived."""

    NEW = "new"  # check it, then reject it, or make it durable and call mark_durable
    DUPLICATE = "duplicate"  # settled before: answer_duplicate
    PENDING = "pending"  # being written: the Ack will follow
    TOO_FAR = "too_far"  # over credit or window: ignore it, it comes again


class Liveness(StrEnum):
    """What is known about a generator. Only ALIVE ones get leases; the leases of DEAD and GONE ones are free."""

    ALIVE = "alive"
    SUSPECT = "suspect"  # silent for a moment
    DEAD = "dead"  # silent for long, or for a moment and without a connection, or beating without progress
    GONE = "gone"  # said Bye, or was replaced by a newer incarnation


class SettledSeqs:
    """The seqs of one incarnation that were seen: all up to `watermark`, those in `beyond`, and some being written."""

    def __init__(self, watermark: int = 0, beyond: Iterable[int] = ()) -> None:
        self.pending_bytes = 0
        self._settled = Frontier(watermark + 1, beyond)  # seqs begin at 1, and a frontier's watermark is no member
        self._pending: dict[int, int] = {}  # seq -> bytes

    @property
    def watermark(self) -> int:
        """Every seq up to this one is settled; 0 when none is."""
        return self._settled.watermark - 1

    @property
    def beyond(self) -> list[int]:
        """The settled seqs above `watermark`, in order."""
        return sorted(self._settled.above)

    def see(self, seq: int, nbytes: int, credit_bytes: int) -> Seen:
        """What to do with result `seq` of `nbytes` bytes; a new one counts against the credit until it is settled."""
        if seq < 1 or seq in self._settled:
            return Seen.DUPLICATE
        if seq in self._pending:
            return Seen.PENDING
        over_credit = self._pending and self.pending_bytes + nbytes > credit_bytes
        if seq > self.watermark + limits.SEQ_WINDOW or over_credit:
            return Seen.TOO_FAR
        self._pending[seq] = nbytes
        self.pending_bytes += nbytes
        return Seen.NEW

    def settle(self, seq: int) -> None:
        """The result is durable, or refused for good."""
        self.pending_bytes -= self._pending.pop(seq, 0)
        self._settled.add(seq)

    def settle_below(self, seq: int) -> None:
        """The generator holds nothing below `seq`: whatever became of it, it will not come again."""
        self._settled.add_below(seq)


@dataclass(eq=False, slots=True)
class DeskSession:
    """One incarnation of one generator, as the desk sees it. `liveness` is what `tick` last found.

    beat_s: seconds between two of its beats, as it was last told; how long it may be silent follows from it.
    """

    generator_id: str
    incarnation: int
    instance: str  # tells two processes apart that claim the same id and incarnation; empty = not known yet
    seqs: SettledSeqs
    heard_at: float
    peer: bytes | None = None  # routing id; None = not connected
    hello: Hello | None = None
    beat: Beat | None = None
    beat_s: float = limits.BEAT_S
    progress_at: float = 0.0
    liveness: Liveness = Liveness.ALIVE
    cut_off: bool = False  # silent, and its connection is gone
    probed_at: float = -math.inf
    fenced: str = ""  # why this incarnation may not come back
    nacks: OrderedDict[int, Nack] = field(default_factory=OrderedDict)  # recent ones, by seq

    def heard(self, now: float) -> None:
        """Something came from it."""
        self.heard_at, self.cut_off = now, False

    def probe_due(self, now: float) -> bool:
        """Whether it is silent for so long that its connection should be looked at; once in BEAT_S then."""
        due = now >= self._probe_at()
        if due:
            self.probed_at = now
        return due

    def _probe_at(self) -> float:
        if self.peer is None:
            return math.inf
        return max(self.heard_at + self.beat_s, self.probed_at) + limits.BEAT_S

    def next_look(self) -> float:
        """When it must be probed or measured next, if nothing comes from it until then; infinity when never."""
        if self.liveness in (Liveness.DEAD, Liveness.GONE):
            return math.inf  # only what it sends can change that
        is_suspect = self.liveness is Liveness.SUSPECT and not self.cut_off
        waits_s = limits.dead_s(self.beat_s) if is_suspect else limits.suspect_s(self.beat_s)
        return min(self._probe_at(), self.heard_at + waits_s, self.progress_at + limits.NO_PROGRESS_S)

    def on_beat(self, beat: Beat, now: float) -> None:
        """Takes in a beat. Answer it with an Ack: that is how the generator knows that the desk lives."""
        if self.beat is None or not beat.active or _progress(beat) != _progress(self.beat):
            self.progress_at = now
        self.beat = beat

    def measure(self, now: float) -> Liveness:
        """Liveness by the clock."""
        if self.liveness is Liveness.GONE:
            return Liveness.GONE
        silence_s = now - self.heard_at
        working = self.beat is not None and bool(self.beat.active)
        stuck = working and now - self.progress_at >= limits.NO_PROGRESS_S
        # A process that was killed takes its connection along at once. One that is stopped may keep it (see
        # HEARTBEAT_TTL_MS): its leases go to others when it is suspect, its place in the weight sync when it is dead.
        suspect_s = limits.suspect_s(self.beat_s)
        if stuck or silence_s >= (suspect_s if self.cut_off else limits.dead_s(self.beat_s)):
            return Liveness.DEAD
        return Liveness.SUSPECT if silence_s >= suspect_s else Liveness.ALIVE


def _progress(beat: Beat) -> tuple[int, ...]:
    return beat.tokens_generated, beat.rollouts_completed, beat.rewards_failed, beat.generations_failed


@dataclass(frozen=True, slots=True)
class SavedSession:
    """What a checkpoint holds of one session. Seqs up to `watermark` are settled, and those in `beyond`."""

    incarnation: int
    instance: str
    watermark: int
    beyond: list[int]


@dataclass(frozen=True)
class Admission:
    """The outcome of a Hello: send `reply`. `session` is None when refused.

    released: (generator_id, incarnation) whose leases are free because a newer incarnation took its place.
    is_first: whether this process is the first one under its id and incarnation: a restarted learner must know it.
    """

    reply: Welcome | Refusal
    session: DeskSession | None = None
    released: tuple[str, int] | None = None
    is_first: bool = False


@dataclass(frozen=True)
class Expected:
    """What a generator must have in common with the learner."""

    model_fingerprint: str
    tokenizer_fingerprint: str
    task: str
    settings: tuple[Setting, ...] = ()  # what decides prompts and rewards


class DeskSessions:
    """All generators that the desk knows, by id and by routing id. Iterates over their sessions.

    credit_bytes: how many bytes of results one generator may have under way.
    """

    def __init__(
        self, *, run_epoch: int, run_name: str, expected: Expected, credit_bytes: int, max_frame_bytes: int
    ) -> None:
        self.run_epoch = run_epoch
        self.superseded_by: int | None = None  # a higher run epoch, seen by a generator: this learner was replaced
        self.paused = False  # no credit is given: the desk takes no more results but those of evaluations
        self.fleet_size = 0  # admitted generators: how often each is asked to beat follows from it
        self._credit_bytes = credit_bytes
        self._run_name = run_name
        self._expected = expected
        self._max_frame_bytes = max_frame_bytes
        self._by_id: dict[str, DeskSession] = {}
        self._by_peer: dict[bytes, DeskSession] = {}
        self._has_forgotten = False  # a generator that was here, for lack of room
        # When each session is to be looked at: what is heard of it in the meantime only puts that off.
        self._looks: Deadlines[str] = Deadlines()
        self._to_measure: dict[str, DeskSession] = {}  # looked at since the last tick, or heard again

    def __iter__(self) -> Iterator[DeskSession]:
        return iter(list(self._by_id.values()))

    def get(self, generator_id: str) -> DeskSession | None:
        """The newest session of a generator."""
        return self._by_id.get(generator_id)

    # -- which generators are there

    def hello(self, peer: bytes, hello: Hello, *, version: int, now: float) -> Admission:
        """Admits or refuses the generator behind `peer`. version: the newest policy version."""
        session = self._by_id.get(hello.generator_id)
        if refused := self._mismatch(hello) or self._fence(session, hello) or self._double(session, hello):
            return Admission(refused)
        released = None
        if session is None or hello.incarnation > session.incarnation:
            if session is not None:
                released = (session.generator_id, session.incarnation)
            session = self._adopt(hello.generator_id, hello.incarnation, now)
        self._by_peer.pop(session.peer or b"", None)
        self._by_peer[peer] = session
        session.peer = peer
        session.hello = hello
        is_first = session.instance != hello.instance
        session.instance = hello.instance
        session.heard(now)
        session.progress_at = now
        session.liveness = Liveness.ALIVE
        self._looks.set(session.generator_id, session.next_look())
        session.seqs.settle_below(hello.first_unacked_seq)
        welcome = Welcome(
            run_epoch=self.run_epoch,
            run_name=self._run_name,
            version=version,
            credit_bytes=self._offered_credit,
            acked_seq=session.seqs.watermark,
            beat_s=self._told_beat_s(session),
            max_frame_bytes=self._max_frame_bytes,
        )
        return Admission(welcome, session, released, is_first)

    def of(self, peer: bytes, now: float) -> DeskSession | None:
        """The session behind `peer`, which was just heard. None: send it `unknown_peer`."""
        session = self._by_peer.get(peer)
        if session is not None:
            session.heard(now)
            if session.liveness is not Liveness.ALIVE:
                self._to_measure[session.generator_id] = session
        return session

    def behind(self, peer: bytes) -> DeskSession | None:
        """The session behind `peer`, whether or not it was just heard."""
        return self._by_peer.get(peer)

    def unknown_peer(self) -> Nack:
        """Asks a peer to say hello: it knew the learner before this one, or its session was replaced."""
        return Nack(self.run_epoch, seq=0, code=NackCode.HELLO, reason="this learner does not know you: say hello")

    def bye(self, session: DeskSession) -> None:
        """The generator left: nothing of this incarnation will follow."""
        session.liveness = Liveness.GONE
        self._by_peer.pop(session.peer or b"", None)
        session.peer = None

    def to_probe(self, now: float) -> list[DeskSession]:
        """Sessions that are silent for so long that their connections should be looked at, before `tick`."""
        self._take_looks(now)
        return [session for session in self._to_measure.values() if session.probe_due(now)]

    def tick(self, now: float) -> list[tuple[DeskSession, Liveness]]:
        """Sessions whose liveness changed since the last call, each with what it was before.

        Only those are measured whose time has come: it costs nothing that others are known.
        """
        self._take_looks(now)
        measured, self._to_measure = self._to_measure, {}
        changed = []
        for name, session in measured.items():
            if self._by_id.get(name) is not session:
                continue
            before, session.liveness = session.liveness, session.measure(now)
            if session.liveness is not before:
                changed.append((session, before))
            if (look_at := session.next_look()) < math.inf:
                self._looks.set(name, look_at)
        return changed

    def next_look(self) -> float:
        """When `to_probe` or `tick` has something to do though nothing came; infinity when never."""
        return self._looks.earliest()

    def _take_looks(self, now: float) -> None:
        for name in self._looks.take_due(now):
            if (session := self._by_id.get(name)) is not None:
                self._to_measure[name] = session

    # -- results

    def see(self, session: DeskSession, seq: int, nbytes: int) -> Seen:
        """What to do with result `seq` of `nbytes` bytes."""
        return session.seqs.see(seq, nbytes, self._credit_bytes)

    def mark_durable(self, session: DeskSession, seq: int) -> None:
        """The result is on disk: from now on `ack` covers it."""
        session.seqs.settle(seq)

    def reject(self, session: DeskSession, seq: int, code: NackCode, reason: str) -> Nack:
        """The result will never be accepted. Send the Nack; if the result is repeated, it gets it again."""
        session.seqs.settle(seq)
        nack = session.nacks[seq] = Nack(self.run_epoch, seq, code, reason)
        if len(session.nacks) > limits.SEQ_WINDOW:
            session.nacks.popitem(last=False)
        return nack

    def answer_duplicate(self, session: DeskSession, seq: int) -> Ack | Nack:
        """The answer to a result that was settled before."""
        return session.nacks.get(seq) or self.ack(session)

    def ack(self, session: DeskSession) -> Ack:
        """Everything settled so far, the credit, and when it is to beat again."""
        beat_s = self._told_beat_s(session)
        return Ack(self.run_epoch, session.seqs.watermark, session.seqs.beyond, self._offered_credit, beat_s)

    def _told_beat_s(self, session: DeskSession) -> float:
        """Seconds between two beats, to be told to a generator: from now on its silence is measured by them."""
        before, session.beat_s = session.beat_s, limits.beat_s(self.fleet_size)
        if session.beat_s < before and (look_at := session.next_look()) < math.inf:
            self._looks.set(session.generator_id, look_at)
        return session.beat_s

    @property
    def _offered_credit(self) -> int:
        return 0 if self.paused else self._credit_bytes

    # -- surviving a restart

    def state(self) -> dict[str, SavedSession]:
        """What must survive, by generator id. Results in writing are not part of it."""
        return {
            session.generator_id: SavedSession(
                session.incarnation, session.instance, session.seqs.watermark, session.seqs.beyond
            )
            for session in self._by_id.values()
        }

    def restore(self, state: Mapping[str, SavedSession], now: float) -> None:
        """Takes over what `state` returned in an earlier learner. The generators have yet to say hello."""
        for generator_id, saved in state.items():
            session = self._adopt(generator_id, saved.incarnation, now)
            session.instance = saved.instance
            session.seqs = SettledSeqs(saved.watermark, saved.beyond)

    def replay(self, generator_id: str, incarnation: int, seq: int, now: float) -> None:
        """Settles one seq that the journal holds; in any order, as often as it is there."""
        session = self._by_id.get(generator_id)
        if session is None or session.incarnation < incarnation:
            session = self._adopt(generator_id, incarnation, now)
        if session.incarnation == incarnation:
            session.seqs.settle(seq)

    def replay_admission(self, generator_id: str, incarnation: int, instance: str, now: float) -> None:
        """Takes over which process was the first under an id and incarnation, as the journal holds it."""
        session = self._by_id.get(generator_id)
        if session is None or session.incarnation < incarnation:
            session = self._adopt(generator_id, incarnation, now)
        if session.incarnation == incarnation:
            session.instance = instance

    # -- admission

    def _mismatch(self, hello: Hello) -> Refusal | None:
        expected = self._expected
        for code, want, got in (
            (RefusalCode.PROTOCOL, PROTOCOL_VERSION, hello.protocol),
            (RefusalCode.MODEL, expected.model_fingerprint, hello.model_fingerprint),
            (RefusalCode.TOKENIZER, expected.tokenizer_fingerprint, hello.tokenizer_fingerprint),
            (RefusalCode.TASK, expected.task, hello.task),
        ):
            if want != got:
                remedy = "asyncrl version" if code is RefusalCode.PROTOCOL else code
                reason = f"learner and generator differ in {code}: give both the same {remedy}"
                return Refusal(code, reason, str(want), str(got))
        if found := differences(expected.settings, hello.settings):
            names = ", ".join(difference.name for difference in found)
            reason = f"learner and generator differ in what decides prompts or rewards ({names}): give both the same"
            return Refusal(
                RefusalCode.CONFIG,
                reason,
                "; ".join(f"{difference.name}: {difference.before}" for difference in found),
                "; ".join(f"{difference.name}: {difference.after}" for difference in found),
            )
        if hello.max_run_epoch > self.run_epoch:
            self.superseded_by = max(hello.max_run_epoch, self.superseded_by or 0)
            reason = (
                "the generator has seen a newer run epoch: this learner was replaced, or its run.dir is new; "
                "in the second case restart the generator"
            )
            return Refusal(RefusalCode.RUN_EPOCH, reason, f">= {hello.max_run_epoch}", str(self.run_epoch))
        if not hello.generator_id or hello.incarnation < 1 or hello.first_unacked_seq < 1:
            got = f"{hello.generator_id!r:.80}, {hello.incarnation}, {hello.first_unacked_seq}"
            return Refusal(
                RefusalCode.PROTOCOL, "malformed Hello", "an id, incarnation and first_unacked_seq from 1", got
            )
        return None

    @staticmethod
    def _fence(known: DeskSession | None, hello: Hello) -> Refusal | None:
        if known is None or hello.incarnation > known.incarnation:
            return None
        if hello.incarnation < known.incarnation:
            reason = (
                f"a newer process of generator {known.generator_id} was here; if that is not so, "
                "give this one another generator.id"
            )
            return Refusal(RefusalCode.FENCED, reason, f">= {known.incarnation}", str(hello.incarnation))
        if known.fenced:
            return Refusal(RefusalCode.FENCED, known.fenced, f">= {known.incarnation + 1}", str(hello.incarnation))
        if known.instance not in ("", hello.instance):
            # Two processes under one name would have each other's results taken for duplicates.
            reason = (
                f"two processes call themselves {known.generator_id} and count {hello.incarnation} starts: give each "
                "its own generator.id; if there is only this one, its count is an older copy: start it again"
            )
            return Refusal(RefusalCode.FENCED, reason, known.instance, hello.instance)
        return None

    def _double(self, known: DeskSession | None, hello: Hello) -> Refusal | None:
        """Refuses a generator that was welcomed under this run epoch, and not by this learner.

        It has worked for another one, whose versions and leases have the same numbers.
        """
        was_here = known is not None and known.incarnation == hello.incarnation and known.hello is not None
        if hello.max_run_epoch < max(self.run_epoch, 1) or was_here or self._has_forgotten:
            return None
        reason = (
            f"the generator knows another learner of run epoch {self.run_epoch}: two learners run, or run.dir is new "
            "or an older copy. Stop the other learner; if there is none, start the generator again, or this learner"
        )
        return Refusal(RefusalCode.RUN_EPOCH, reason, f"< {self.run_epoch}", str(hello.max_run_epoch))

    def _adopt(self, generator_id: str, incarnation: int, now: float) -> DeskSession:
        """A new session, in place of any older incarnation's."""
        old = self._by_id.pop(generator_id, None)
        if old is None and len(self._by_id) >= limits.MAX_GENERATORS:
            # The session that is silent for longest: its leases expired long ago, so nothing of it is awaited.
            old = min(self._by_id.values(), key=lambda session: (session.peer is not None, session.heard_at))
            del self._by_id[old.generator_id]
            self._has_forgotten = True
            self._looks.remove(old.generator_id)
        if old is not None:
            self.bye(old)
        session = DeskSession(generator_id, incarnation, "", SettledSeqs(), heard_at=now)
        self._by_id[generator_id] = session
        self._looks.set(generator_id, session.next_look())
        return session
