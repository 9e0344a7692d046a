"""One broken rule each, in the code of the product: what the simulation must notice.

A mutant is applied in the process that simulates, by replacing one method or function of the real classes. Each names
the promise that it breaks, how many seeds may pass before it is found, and the seed that found it when last looked for.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest

from asyncrl.desk import batches, proofs, ranks
from asyncrl.desk.acknowledgements import Acknowledgements
from asyncrl.desk.opening import run_folder
from asyncrl.generator import weight_phases
from asyncrl.link import desk_session, generator_session
from asyncrl.link.desk_session import DeskSessions, Seen
from asyncrl.link.messages import Ack
from asyncrl.replay import lease_book, outcomes, recovery, tickets
from asyncrl.replay.buffer import ReplayBuffer
from asyncrl.replay.lease_records import Acceptance, Verdict
from asyncrl.storage import checkpoint_files, journal, run_epoch
from asyncrl.weights.plan import round as sync_round
from tests.simulation import plan

Patch = pytest.MonkeyPatch
Breaks = Callable[[Patch], None]


@dataclass(frozen=True, slots=True)
class Mutant:
    """A broken rule: `apply` breaks it."""

    apply: Breaks
    promise: str
    seeds: int
    slow: bool
    found_by: int

    @property
    def name(self) -> str:
        return self.apply.__name__


MUTANTS: list[Mutant] = []


def mutant(
    promise: str, *, slow: bool = False, seeds: int = 150, found_by: int = 0
) -> Callable[[Callable[[Patch], None]], Callable[[Patch], None]]:
    """Adds a mutant to the list."""

    def add(apply: Breaks) -> Breaks:
        MUTANTS.append(Mutant(apply, promise, seeds, slow, found_by))
        return apply

    return add


# -- results and acknowledgements --------------------------------------------------------------------------------------


@mutant("nothing is acknowledged before the journal is durable")
def acknowledges_before_the_journal_is_durable(patch: Patch) -> None:
    add = Acknowledgements.add

    def at_once(self, session, seq, **what) -> None:
        add(self, session, seq, **what)
        self._sessions.mark_durable(session, seq)
        self._due[session.generator_id] = session

    patch.setattr(Acknowledgements, "add", at_once)


@mutant("what was written counts as durable only once it was synced")
def takes_a_write_for_durable(patch: Patch) -> None:
    opened = vars(journal.Journal)["open"].__func__

    def without_sync(cls, folder, *arguments, **options):
        return opened(cls, folder, *arguments, **options | {"flush": lambda fd: None})

    patch.setattr(journal.Journal, "open", classmethod(without_sync))


@mutant("a journal that is opened again is durable before it is relied on")
def relies_on_the_page_cache_of_a_killed_learner(patch: Patch) -> None:
    begin = journal.Journal.begin_writing

    def unsynced(self) -> None:
        with pytest.MonkeyPatch.context() as inner:
            inner.setattr(journal.os, "fsync", lambda fd: None)
            inner.setattr(journal, "fsync_folder", lambda folder: None)
            begin(self)

    patch.setattr(journal.Journal, "begin_writing", unsynced)


@mutant("an acknowledgement covers what is durable and nothing more", found_by=1)
def acknowledges_one_too_many(patch: Patch) -> None:
    ack = DeskSessions.ack

    def further(self, session) -> Ack:
        right = ack(self, session)
        pending = session.seqs._pending
        return replace(right, acked_seq=right.acked_seq + 1) if right.acked_seq + 1 in pending else right

    patch.setattr(DeskSessions, "ack", further)


@mutant("no two results of one incarnation have the same number")
def uses_a_number_again(patch: Patch) -> None:
    put = generator_session.GeneratorSession.put

    def again(self, make, now) -> int:
        self._last_seq = max(self._unacked, default=0)  # forgets the numbers that were acknowledged
        return put(self, make, now)

    patch.setattr(generator_session.GeneratorSession, "put", again)


@mutant("a result stays in the outbox until it is acknowledged")
def forgets_its_outbox_when_it_connects_again(patch: Patch) -> None:
    reconnected = generator_session.GeneratorSession.reconnected

    def emptied(self, now) -> None:
        reconnected(self, now)
        for seq in list(self._unacked):
            self._drop(seq)

    patch.setattr(generator_session.GeneratorSession, "reconnected", emptied)


@mutant("a prompt that has its group takes no other one", slow=True, found_by=97)
def accepts_a_duplicate(patch: Patch) -> None:
    accept = lease_book.LeaseBook._accept

    def takes_all(self, key, now) -> Acceptance:
        taken = accept(self, key, now)
        if taken.verdict is Verdict.DUPLICATE and key.ordinal not in self._accepted:
            self._accepted[key.ordinal] = key.attempt
            return Acceptance(Verdict.ACCEPTED)
        return taken

    patch.setattr(lease_book.LeaseBook, "_accept", takes_all)


@mutant("only what was stored or refused is settled")
def takes_some_new_results_for_repeated_ones(patch: Patch) -> None:
    see = desk_session.SettledSeqs.see

    def mistaken(self, seq, nbytes, credit_bytes) -> Seen:
        if seq % 5 == 4 and seq not in self._settled and seq <= self.watermark + 1:
            self.settle(seq)
        return see(self, seq, nbytes, credit_bytes)

    patch.setattr(desk_session.SettledSeqs, "see", mistaken)


# -- processes that were replaced --------------------------------------------------------------------------------------


@mutant("a generator that was replaced is fenced", found_by=4)
def lets_an_earlier_incarnation_back_in(patch: Patch) -> None:
    hello = DeskSessions.hello

    def as_the_newest(self, peer, message, **when):
        known = self.get(message.generator_id)
        if known is not None and message.incarnation < known.incarnation:
            message = replace(message, incarnation=known.incarnation, instance=known.instance)
        return hello(self, peer, message, **when)

    patch.setattr(DeskSessions, "hello", as_the_newest)


@mutant("every start of the learner has a run epoch of its own")
def starts_under_the_run_epoch_of_before(patch: Patch) -> None:
    raised = run_epoch.next_run_epoch

    def same(run_dir, *known) -> int:
        return min(raised(run_dir, *known), 1)

    patch.setattr(run_folder, "next_run_epoch", same)


@mutant("a result is taken only from the process that the lease was granted to", found_by=2)
def looks_at_no_ticket(patch: Patch) -> None:
    def believes(self, ticket, key, holder, incarnation) -> int | None:
        version = int.from_bytes(ticket[:8], "little", signed=True)
        return version if len(ticket) > 8 else 0

    patch.setattr(tickets.Tickets, "issued_version", believes)


# -- leases and batches ------------------------------------------------------------------------------------------------


@mutant("a prompt is blamed only where its generator works", slow=True, found_by=28)
def blames_the_prompt_for_its_generator(patch: Patch) -> None:
    patch.setattr(lease_book, "is_beyond_help", lambda strikes, failures, alone: failures >= 3)
    patch.setattr(outcomes.Outcomes, "room", lambda self, holder, room, now: room)


@mutant("a lease that was adopted is not granted again", found_by=8)
def grants_an_adopted_lease_again(patch: Patch) -> None:
    adopt = lease_book.LeaseBook.adopt

    def stays_waiting(self, holder, key, issued_version, now) -> bool:
        adopted = adopt(self, holder, key, issued_version, now)
        if adopted:
            self._waiting.add(key.ordinal, now, now)
        return adopted

    patch.setattr(lease_book.LeaseBook, "adopt", stays_waiting)


@mutant("the saved frontier holds what was trained, not what was accepted", slow=True, found_by=55)
def saves_a_frontier_ahead_of_training(patch: Patch) -> None:
    state = lease_book.LeaseBook.state

    def ahead(self):
        saved = state(self)
        for ordinal in self._accepted:
            saved.settled.add(ordinal)
        return saved

    patch.setattr(lease_book.LeaseBook, "state", ahead)


@mutant("a batch is dealt only after its record is durable")
def deals_a_batch_before_its_record_is_durable(patch: Patch) -> None:
    decide = ranks.Ranks.decide

    def undurable(self, now) -> bool:
        with pytest.MonkeyPatch.context() as inner:
            inner.setattr(self._acknowledgements, "make_durable", lambda: None)
            return decide(self, now)

    patch.setattr(ranks.Ranks, "decide", undurable)


@mutant("a step that was decided is trained again as it was", slow=True, found_by=12)
def forgets_which_steps_were_decided(patch: Patch) -> None:
    plan_steps = recovery._plan_steps

    def none(plan, checkpoint_version, steps, places) -> None:
        plan_steps(plan, checkpoint_version, {v: s for v, s in steps.items() if v < checkpoint_version}, places)

    patch.setattr(recovery, "_plan_steps", none)


@mutant("a trainer that comes back gets the batches of before, whole and once", found_by=1)
def deals_the_steps_of_before_one_group_short(patch: Patch) -> None:
    deal = batches.BatchDealer.train_again

    def mixed(self, steps) -> None:
        deal(self, [replace(step, places=step.places[:-1] + step.places[:1]) for step in steps])

    patch.setattr(batches.BatchDealer, "train_again", mixed)


@mutant("no token is trained at a higher age than staleness.max_age", found_by=14)
def takes_batches_without_waiting_for_old_leases(patch: Patch) -> None:
    patch.setattr(ReplayBuffer, "_straggling", lambda self, version, running: None)
    patch.setattr(ReplayBuffer, "drop_over_age", lambda self, version: [])
    patch.setattr(ReplayBuffer, "_num_over_age", lambda self, version: 0)


@mutant("a filtered group is recorded", found_by=1)
def filters_without_a_record(patch: Patch) -> None:
    append = journal.Journal.append

    def silent(self, record, now):
        if type(record).__name__ == "GroupFiltered":
            return None
        return append(self, record, now)

    patch.setattr(journal.Journal, "append", silent)


# -- checkpoints -------------------------------------------------------------------------------------------------------


@mutant("a checkpoint is durable before it is told of", found_by=5)
def tells_of_a_checkpoint_before_it_is_durable(patch: Patch) -> None:
    patch.setattr(checkpoint_files, "_fsync_tree", lambda folder: None)
    patch.setattr(checkpoint_files, "make_durable", lambda path: None)


@mutant("a segment is deleted only when a kept checkpoint covers all that is in it", slow=True, seeds=400, found_by=50)
def deletes_segments_whose_groups_wait(patch: Patch) -> None:
    patch.setattr(plan, "SEGMENT_BYTES", (700,))  # so that groups wait longer than it takes to fill a segment
    patch.setattr(journal._Segment, "needed_only_before", lambda self, version: True)


# -- weights -----------------------------------------------------------------------------------------------------------


@mutant("no version is committed before its digests agree", slow=True, found_by=6)
def commits_without_comparing_digests(patch: Patch) -> None:
    staged = sync_round.SyncRound._staged

    def believes(self, member, message, now) -> None:
        digests = [list(self.snapshot.manifest.digests)] * member.receiver.num_workers
        staged(self, member, message if message.error else replace(message, digests=digests), now)

    patch.setattr(sync_round.SyncRound, "_staged", believes)


@mutant("no version is committed before the canary agrees", slow=True, found_by=10)
def commits_without_looking_at_the_canary(patch: Patch) -> None:
    patch.setattr(sync_round, "canary_differences", lambda ours, theirs: (0.0, 0.0))


@mutant("no version is committed before the bits in use agree", slow=True, found_by=10)
def commits_without_looking_at_the_bits_in_use(patch: Patch) -> None:
    patch.setattr(sync_round, "_wrong_bits", lambda member, told, version: "")


@mutant("weights that were found wrong are not sampled from", slow=True, seeds=600, found_by=80)
def goes_on_sampling_after_an_abort(patch: Patch) -> None:
    async def untouched(self, abort) -> None:
        self._channel = None

    patch.setattr(weight_phases.WeightSync, "_abort", untouched)


@mutant("no token leaves before its version is proven", found_by=4)
def lets_tokens_go_before_their_version_is_proven(patch: Patch) -> None:
    async def at_once(self, versions, timeout_s, *, since) -> None:
        return None

    patch.setattr(weight_phases.WeightSync, "wait_proven", at_once)
    patch.setattr(proofs.Proofs, "check", lambda self, group, session: None)
