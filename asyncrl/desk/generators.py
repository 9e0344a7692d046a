"""The generators as the desk sees them: admission, beats, leases, acknowledgements, and their end."""

from __future__ import annotations

import logging
from functools import partial
from itertools import islice

from asyncrl.config import Config
from asyncrl.desk.acknowledgements import Acknowledgements
from asyncrl.desk.prompts import LeasedPrompts
from asyncrl.desk.run_state import RunState
from asyncrl.desk.versions import Versions
from asyncrl.host.repeats import Repeats
from asyncrl.link import messages
from asyncrl.link.desk_session import DeskSession, Liveness
from asyncrl.link.rollouts import lease_to_grant
from asyncrl.link.schema.message_base import Message
from asyncrl.link.sockets import ServerSocket
from asyncrl.link.wire_types import RefusalCode
from asyncrl.replay.lease_records import LeaseRecord
from asyncrl.replay.outcomes import Recovered
from asyncrl.storage.records import GeneratorAdmitted
from asyncrl.types import Lease, LeaseKey, LeaseKind

log = logging.getLogger(__name__)

# Seeds of one group are seed, seed + 1, ...; this far apart, those of two groups never meet.
ORDINAL_SEED_STRIDE = 8191
RUN_SEED_STRIDE = 1_000_003
SAY_STRANGERS_EVERY_S = 60.0
HELLOS_REFUSED_AT_ONCE = 8  # said one by one; more within a minute are counted
# One call of `grant`: leases that it grants, and generators whose turn it is, most of which may have to wait.
GRANTS_AT_ONCE = 64
TURNS_AT_ONCE = 256
# A desk that did not look for so long finds everybody silent; what they said meanwhile waits to be read.
STOOD_STILL_S = 1.0
# Sequences of all leases that a generator may have in hand, for each that it samples at once: what it holds itself to
# (`generator.held_leases`). Adopted leases keep to it too.
IN_HAND_FACTOR = 5
MAX_NAMED = 8  # generators in a line of the log


class Generators:
    """All generators of the run. A generator is *admitted* from its hello until it leaves, dies or is replaced."""

    def __init__(
        self,
        config: Config,
        *,
        socket: ServerSocket,
        state: RunState,
        prompts: LeasedPrompts,
        acknowledgements: Acknowledgements,
        versions: Versions,
    ) -> None:
        self.socket = socket
        self._config = config
        self._run_epoch = state.run_epoch
        self._policy = state.policy
        self._journal = state.journal
        self._sessions = state.sessions
        self._leases = state.leases
        self._tickets = state.tickets
        self._counters = state.counters
        self._prompts = prompts
        self._acknowledgements = acknowledgements
        self._versions = versions
        # Admitted generators -> sequences leased to them in this run epoch; None before their first beat.
        self._granted: dict[str, int | None] = {}
        self._wanting: dict[str, None] = {}  # those that have room for more, whose turn is next first
        # Generators whose last beat listed just the leases they hold: when those changed last, and the list.
        self._agreed: dict[str, tuple[tuple[int, int], list[messages.ActiveLease]]] = {}
        self.grants_left = False  # the last call of `grant` stopped before all had their turn
        self._repeats = Repeats(log, HELLOS_REFUSED_AT_ONCE)
        self._one_could_work = False  # held a version, ever
        self._refused = ""  # who was refused last
        self._looked_at = 0.0  # when `expire` was called last
        self._strangers = (0, 0)  # as last said: handshakes refused, messages that are none
        self._strangers_said_at = -SAY_STRANGERS_EVERY_S

    # -- coming and going ------------------------------------------------------------------------------------------

    def hello(self, peer: bytes, hello: messages.Hello, now: float) -> None:
        """Admits or refuses; a newer incarnation takes the place of the one before."""
        keys = self.socket.keys
        if keys is not None and (why := keys.refusal(peer, hello.generator_id)):
            self._to_peer(peer, messages.Refusal(RefusalCode.FENCED, why, "", hello.generator_id))
            self._repeats.warn("a hello refused", f"{hello.generator_id}: {why}", now)
            return
        admission = self._sessions.hello(peer, hello, version=self._policy.trained, now=now)
        self._to_peer(peer, admission.reply)
        if admission.is_first:
            self._journal.append(GeneratorAdmitted(hello.generator_id, hello.incarnation, hello.instance), now)
        if admission.released is not None:
            self._free(admission.released[0], "was replaced by a newer incarnation", now)
            self._leases.outcomes.forget(admission.released[0])
        if admission.session is None:
            self._repeats.warn("a hello refused", f"{hello.generator_id}: {admission.reply}", now)
            self._refused = f"the last that was refused is {hello.generator_id}"
        elif hello.generator_id not in self._granted:
            self._admit(admission.session)

    def session_of(self, peer: bytes, now: float) -> DeskSession | None:
        """The session of a frame's sender. A peer that is not known is asked to say hello, and None is returned."""
        session = self._sessions.of(peer, now)
        if session is None:
            self._to_peer(peer, self._sessions.unknown_peer())
        return session

    def bye(self, session: DeskSession, message: messages.Bye, now: float) -> None:
        """A generator leaves by itself."""
        self.gone(session.generator_id, f"said goodbye ({message.reason})", now)
        self._leases.outcomes.forget(session.generator_id)

    def gone(self, name: str, why: str, now: float) -> None:
        """Ends a generator's session; it would have to come back as a new incarnation."""
        if (session := self._sessions.get(name)) is not None:
            self._sessions.bye(session)
        self._free(name, why, now)

    def fence(self, peer: bytes, why: str, now: float) -> None:
        """Ends the session behind `peer`, and refuses this process for good; its next incarnation may come."""
        session = self._sessions.behind(peer)
        self._to_peer(peer, messages.Refusal(RefusalCode.FENCED, why, "", ""))
        if session is not None:
            session.fenced = why
            self.gone(session.generator_id, f"is fenced: {why}", now)

    def name_of(self, peer: bytes) -> str:
        """The id of the generator behind `peer`; empty when it is not admitted."""
        session = self._sessions.behind(peer)
        return "" if session is None else session.generator_id

    def expire(self, now: float) -> None:
        """Applies the deadlines of leases and beats."""
        stood_still = now - self._looked_at >= STOOD_STILL_S
        self._looked_at = now
        for record in self._leases.expire(now):
            log.warning("lease %s of %s expired: leased again", record.key, record.holder)
            self.abandon(record)
        self._probe_silent(now)
        silent = []
        for session, _ in self._sessions.tick(now):
            name = session.generator_id
            if session.liveness is Liveness.DEAD:
                self._free(name, "is dead: no beat, or beats without progress", now)
            elif session.liveness is Liveness.SUSPECT:
                log.warning("generator %s is silent", name)
                silent.append(name)
            elif session.liveness is Liveness.ALIVE and name not in self._granted and session.hello is not None:
                # It was taken for dead and is here again: what it held is gone, so it begins with the weights.
                self._admit(session)
        if silent and not stood_still and self.alive():
            self._relieve(silent, now)

    def _relieve(self, silent: list[str], now: float) -> None:
        """Gives what silent generators hold to others: once max_age old, it holds the learner up.

        A process that was stopped may keep its connection, and is taken for dead late. If it comes back before that,
        its next beat is answered by what it need not finish; what it has finished still counts where it is first.
        """
        for name in silent:
            if released := self._leases.release(name, now):
                log.warning("%d leases of generator %s go to others while it is silent", len(released), name)

    def judge(self) -> None:
        """Says who was set aside because its leases fail, and has the weights of such a generator sent again."""
        for news in self._leases.outcomes.take_news():
            if isinstance(news, Recovered):
                log.info("generator %s finished its trial lease: it gets leases as before", news.name)
                continue
            log.warning(
                "generator %s is set aside: %d of its last %d leases failed (%s; the last one: %s); its weights are "
                "sent again, and it gets one lease as a trial in %.0f s, later again while trials fail (said once)",
                news.name,
                news.num_failed,
                news.num_ended,
                ", ".join(f"{count} x {reason}" for reason, count in news.reasons.items()),
                news.detail or "no detail",
                news.backoff_s,
            )
            self._versions.send_again(news.name)

    def hopeless(self) -> str:
        """Why no generator that is here will bring a group any more, in words; empty while one may."""
        return self._leases.outcomes.hopeless(self._granted)

    def _probe_silent(self, now: float) -> None:
        """Sends silent generators an Ack that nobody asked for: if it cannot be sent, the connection is gone."""
        for session in self._sessions.to_probe(now):
            assert session.peer is not None
            session.cut_off = not self.socket.reaches(session.peer, self._sessions.ack(session))

    def say_strangers(self, now: float) -> None:
        """One warning for all that knocked since the last one, so that a flood of them cannot fill the log."""
        self._repeats.summarise(now)
        if self.socket.keys is not None:
            for peer in self.socket.keys.revoked(now):
                self.fence(peer, "its key was removed from transport.allowed_keys_file", now)
        strangers = self.socket.handshakes_refused, self.socket.malformed_messages
        if strangers == self._strangers or now < self._strangers_said_at + SAY_STRANGERS_EVERY_S:
            return
        refused, malformed = (new - old for new, old in zip(strangers, self._strangers, strict=True))
        log.warning(
            "%d connections were refused before a hello (no key, one that is not in transport.allowed_keys_file, or "
            "another protocol), %d messages were not of one frame; said at most every %.0f s",
            refused,
            malformed,
            SAY_STRANGERS_EVERY_S,
        )
        self._strangers = strangers
        self._strangers_said_at = now

    def stop(self, finished: bool, reason: str) -> None:
        """Tells all generators that the learner stops; they leave when the run is finished, else wait for the next."""
        for session in self._sessions:
            self._send(session, messages.Stop(self._run_epoch, finished, reason))

    def alive(self) -> list[DeskSession]:
        """Admitted generators whose beats come in time."""
        sessions = map(self._sessions.get, self._granted)
        return [session for session in sessions if session is not None and session.liveness is Liveness.ALIVE]

    def missing(self, now: float, *, trainer_loads: bool) -> str:
        """What is missing before any generator can work, by name; empty when one holds a version, or did once."""
        if self._one_could_work or any(self._versions.held_version(name) is not None for name in self._granted):
            self._one_could_work = True
            return ""
        if not self._granted:
            refused = self._refused or "none was refused"
            return (
                f"no generator has connected to {self.socket.address} yet ({refused}); start one with: "
                "asyncrl-generator CONFIG.yaml, with the learner's configuration and this transport.address"
            )
        waits = "for the trainer, which is loading" if trainer_loads else "for its weights"
        states = []
        for session in map(self._sessions.get, self._granted):
            if session is None:
                continue
            if session.liveness is not Liveness.ALIVE:
                what = f"is silent for {now - session.heard_at:.0f} s"
            elif session.beat is None or not session.beat.ready:
                what = "starts its engine"
            else:
                what = f"waits {waits}"
            states.append(f"{session.generator_id} {what}")
        more = f" and {len(states) - MAX_NAMED} more" if len(states) > MAX_NAMED else ""
        return f"no generator can work yet: {', '.join(states[:MAX_NAMED])}{more}"

    def describe(self) -> str:
        """Who is there and what they hold, for the log."""
        names = [f"{s.generator_id} at version {self._versions.held_version(s.generator_id)}" for s in self.alive()]
        return f"{len(names)} generators alive: {', '.join(names)}" if names else "no generator is alive"

    def _admit(self, session: DeskSession) -> None:
        assert session.hello is not None
        log.info("generator %s joined (incarnation %d)", session.generator_id, session.incarnation)
        # A generator that was taken for dead goes on counting from what its next beat says it received.
        self._granted[session.generator_id] = None
        self._sessions.fleet_size = len(self._granted)

    def _free(self, name: str, why: str, now: float) -> None:
        """Gives the leases that a generator held back to the lease book, and takes it out of the weight sync."""
        released = self._leases.release(name, now)
        log.warning("generator %s %s; %d leases go back", name, why, len(released))
        self._granted.pop(name, None)
        self._sessions.fleet_size = len(self._granted)
        self._wanting.pop(name, None)
        self._agreed.pop(name, None)
        self._leases.outcomes.died(name)
        self._versions.left(name, why, now)

    # -- leases ----------------------------------------------------------------------------------------------------

    def beat(self, session: DeskSession, beat: messages.Beat, now: float) -> None:
        """Takes in what a generator says of itself, and answers with the state of its acknowledgements."""
        session.on_beat(beat, now)
        self._counters.beat(session.generator_id, session.incarnation, beat)
        if beat.run_epoch == self._run_epoch:
            if session.generator_id in self._granted and self._granted[session.generator_id] is None:
                self._granted[session.generator_id] = beat.sequences_received
            self._compare_leases(session, beat, now)
            granted = self._granted.get(session.generator_id)
            if granted is not None and beat.sequences_wanted > granted:
                self._wanting.setdefault(session.generator_id)
            if beat.ready and session.hello is not None:
                # Not at the hello: the engine starts only then, and weights can be sent to a started one alone.
                hello = session.hello
                self._versions.joined(
                    session.generator_id, session.incarnation, hello.num_workers, now, hello.placement
                )
            self._versions.holds(session.generator_id, beat.held_version, now)
        # The answer to a beat is the state of acknowledgements: it repairs lost ones and shows that the desk lives.
        self._send(session, self._sessions.ack(session))

    def _compare_leases(self, session: DeskSession, beat: messages.Beat, now: float) -> None:
        name = session.generator_id
        if self._agreed.get(name) == (self._leases.last_change(name), beat.active):
            return  # both sides had the same leases a beat ago, and neither has others now
        active = {lease.key: lease.issued_version for lease in beat.active}
        in_hand = [lease.key for lease in beat.active if lease.issued_version is not None]
        tickets = dict(zip(in_hand, beat.tickets, strict=False))  # one that is not there proves nothing
        reconciled = self._leases.reconcile(name, active, now)
        for record in reconciled.lost:
            log.warning("%s does not know lease %s: leased again", name, record.key)
            granted = self._granted[name]
            assert granted is not None, f"{name} lost a lease that nobody granted"
            self._granted[name] = granted - self._num_rollouts(record.key) - self._wants_baseline(record.key)
        needless = [
            key
            for key in reconciled.unexpected
            # One whose result waits in the outbox goes on in any case.
            if active[key] is not None and not self._adopt(session, key, tickets.get(key, b""), now)
        ]
        if needless:
            self._send(session, messages.Abandon(self._run_epoch, needless))
        if self._leases.holds_exactly(name, active):
            self._agreed[name] = self._leases.last_change(name), beat.active

    def _adopt(self, session: DeskSession, key: LeaseKey, ticket: bytes, now: float) -> bool:
        """Lets a lease of an earlier run epoch go on, whose ticket proves that it is this process's and how old it is.

        No generator takes over more than it can work on, and nothing of a version that this run has not reached: then
        the ticket is of a future that was lost with the journal.
        """
        name = session.generator_id
        issued_version = self._tickets.issued_version(ticket, key, name, session.incarnation)
        if issued_version is None or issued_version > self._policy.newest:
            return False
        room = IN_HAND_FACTOR * self._config.generator.max_sequences
        if self._leases.num_held(name) * self._num_rollouts(key) >= room:
            return False
        return self._leases.adopt(name, key, issued_version, now)

    def grant(self, now: float) -> None:
        """Grants leases to the generators that have room, as far as pacing allows: a slice of them in each call.

        While `grants_left` is set, the next call goes on with those whose turn has not come: a fleet that wants
        thousands of leases at once must not keep beats waiting.
        """
        left = GRANTS_AT_ONCE
        turns = list(islice(self._wanting, TURNS_AT_ONCE)) if self._leases.may_grant(self._policy.trained) else []
        for name in turns:
            del self._wanting[name]
            left -= self._grant_to(name, left, now)
            if self._wants(name):
                self._wanting[name] = None  # behind all others
            if left <= 0:
                break
        self.grants_left = left <= 0 and bool(self._wanting)

    def _grant_to(self, name: str, most: int, now: float) -> int:
        """Grants up to `most` leases to one generator; returns how many it were."""
        session = self._sessions.get(name)
        if session is None or not self._wants(name):
            return 0
        num_granted = 0
        trained, is_there = self._policy.trained, partial(self._prompts.is_there, now=now)
        while num_granted < most and self._wants(name):
            records = self._leases.grant(name, self._versions.held_version(name), 1, trained, now, is_there)
            if not records:
                break
            lease = self._lease(records[0], session, now)
            num_granted += 1
            granted = self._granted[name]
            assert granted is not None
            self._granted[name] = granted + lease.num_sequences
            self._send(session, lease_to_grant(lease, self._run_epoch))
        return num_granted

    def _wants(self, name: str) -> bool:
        """Whether a generator is there, has room, and said so to this learner."""
        session = self._sessions.get(name)
        if session is None or session.liveness is not Liveness.ALIVE or session.beat is None:
            return False
        granted = self._granted.get(name)
        # None: the beat is from before it was taken for dead.
        return (
            granted is not None
            and session.beat.run_epoch == self._run_epoch
            and session.beat.sequences_wanted > granted
        )

    def _lease(self, record: LeaseRecord, session: DeskSession, now: float) -> Lease:
        sampling, key = self._config.sampling, record.key
        is_eval = key.kind is LeaseKind.EVAL
        prompt = self._prompts.of(key)
        seed = None
        if sampling.repeatable and not (is_eval and self._config.eval.temperature == 0.0):
            seed = self._config.run.seed * RUN_SEED_STRIDE + key.ordinal * ORDINAL_SEED_STRIDE
        return Lease(
            key=key,
            issued_version=record.issued_version,
            deadline_s=record.deadline_at - now,
            prompt_token_ids=prompt.token_ids,
            payload=prompt.payload,
            num_rollouts=self._num_rollouts(key),
            max_new_tokens=sampling.max_new_tokens,
            temperature=self._config.eval.temperature if is_eval else sampling.temperature,
            pinned_version=record.pinned_version,
            seed=seed,
            greedy_baseline=self._wants_baseline(key),
            ticket=self._tickets.issue(key, record.issued_version, session.generator_id, session.incarnation),
            user_text=prompt.user_text,
        )

    def _num_rollouts(self, key: LeaseKey) -> int:
        return self._config.eval.samples if key.kind is LeaseKind.EVAL else self._config.sampling.group_size

    def _wants_baseline(self, key: LeaseKey) -> bool:
        return key.kind is LeaseKind.TRAIN and self._config.algorithm.advantage == "remax"

    def abandon(self, record: LeaseRecord) -> None:
        """Tells the holder of a lease that it is needless now."""
        self.send(record.holder, messages.Abandon(self._run_epoch, [record.key]))

    # -- sending ---------------------------------------------------------------------------------------------------

    def acknowledge(self) -> None:
        """Tells every generator that has results which became durable."""
        for session in self._acknowledgements.take_sessions():
            self._send(session, self._sessions.ack(session))

    def reply(self, session: DeskSession, message: Message) -> None:
        """Answers the generator of a session."""
        self._send(session, message)

    def send(self, name: str, message: Message) -> None:
        """Sends a message to a generator by its id; nothing happens when that has no session."""
        if (session := self._sessions.get(name)) is not None:
            self._send(session, message)

    def _send(self, session: DeskSession, message: Message) -> None:
        if session.peer is not None:
            self._to_peer(session.peer, message)

    def _to_peer(self, peer: bytes, message: Message) -> None:
        """Best effort: a message that is lost is asked for again, or its cause ends by a deadline."""
        if not self.socket.send_message(peer, message):
            log.debug("%s not sent: the peer is gone or reads nothing", type(message).__name__)
