"""The weight sync state machine, driven by hand: no sockets, no clock, no engine."""

import numpy as np
import pytest

from asyncrl.link.messages import SyncAbort, SyncCommit, SyncOffer, SyncReply, SyncSwap
from asyncrl.link.trainer_messages import (
    Broadcast,
    BroadcastDone,
    ChannelReady,
    CloseChannel,
    OpenChannel,
    SnapshotReady,
    SnapshotWanted,
)
from asyncrl.link.weight_records import BitsInUse, DeltaInfo, Placement
from asyncrl.link.wire_types import SyncPhase
from asyncrl.weights.plan.planner import (
    CELL_GRACE_S,
    COMMIT_REPEAT_S,
    MAX_CATCH_UPS,
    REOPEN_S,
    WANTED_REPEAT_S,
    SyncPlanner,
)
from asyncrl.weights.plan.records import (
    Committed,
    RoundEnded,
    SyncFailed,
    ToGenerator,
    ToPublisher,
    Unreachable,
)
from asyncrl.weights.plan.round import GRACE_S, MAX_ERRORS, MAX_TAINTS, PENALTY_S
from tests.weights.manifests import manifest_of

TIMEOUT_S = 10.0
DIGESTS = [11, 22]
CANARY = [np.array([-1.0, -2.0], np.float32).tobytes()]


class Bench:
    """A planner, and the answers its peers would give."""

    def __init__(self, *names, cell_size=8, tolerance=1e-4, **options):
        self.planner = SyncPlanner(
            run_epoch=1, run_name="r", timeout_s=TIMEOUT_S, tolerance=tolerance, cell_size=cell_size, **options
        )
        self.now = 100.0
        for name in names:
            self.planner.joined(name, 1, 1, self.now)

    @property
    def round(self):
        """The round under way, None if there is none; of several use `round_of`."""
        assert len(self.planner.rounds) <= 1, self.planner.rounds
        return next(iter(self.planner.rounds.values()), None)

    def round_of(self, name):
        (found,) = [current for current in self.planner.rounds.values() if name in current.members]
        return found

    def snapshot(self, version, base=None):
        """`base`: the publisher also has the delta to this version."""
        delta = None if base is None else DeltaInfo(base, 100, 0, 1 << 18)
        message = SnapshotReady(version, manifest_of(version, DIGESTS), [b"\x01\0\0\0"], CANARY, 1.0, delta)
        self.planner.snapshot_ready(message, self.now)
        self.planner.advance(self.now)
        return self.take()

    def take(self):
        return self.planner.take_outputs()

    def open_channel(self):
        """The publisher opens all channels it was asked for."""
        for epoch in [epoch for epoch, current in self.planner.rounds.items() if current.opening]:
            self.planner.channel_ready(ChannelReady(epoch, "127.0.0.1", 9, ""), self.now)
        return self.take()

    def reply(self, name, phase, *, error="", digests=None, canary=None, in_use=None):
        current = self.round_of(name)
        if in_use is None:
            in_use = [BitsInUse(current.snapshot.version, 9, [], [])] * self.planner.receivers[name].num_workers
        fields = {"digests": [digests or DIGESTS]}
        if phase == "swap":
            fields = {"canary_logprobs": canary or CANARY, "in_use": in_use}
        if error:
            fields = {}
        message = SyncReply(1, current.snapshot.version, current.attempt, SyncPhase(phase), error, **fields)
        self.planner.reply(name, message, self.now)
        return self.take() + self.after(0.0)

    def broadcast_done(self, error="", of=None):
        """`of`: a member of the round, where there are several."""
        current = self.round if of is None else self.round_of(of)
        done = BroadcastDone(current.snapshot.version, current.attempt, current.channel_epoch, error, 5.0, 100)
        self.planner.broadcast_done(done, self.now)
        return self.take() + self.after(0.0)

    def after(self, seconds):
        self.now += seconds
        self.planner.advance(self.now)
        return self.take()

    def offered(self, outputs):
        """The base of what publisher and generators were told to transfer; None = all of the weights."""
        if self.round.opening:
            outputs = self.open_channel()
        (order,) = messages(outputs, Broadcast)
        told = {offer.manifest.delta and offer.manifest.delta.base_version for offer in messages(outputs, SyncOffer)}
        assert told == {order.base_version}
        return order.base_version

    def sync_all(self, version, names, base=None):
        """A whole round in which everything works."""
        self.offered(self.snapshot(version, base))
        outputs = []
        for name in names:
            outputs += self.reply(name, "stage")
        outputs += self.broadcast_done()
        for name in names:
            outputs += self.reply(name, "swap")
        return outputs

    def catch_up(self, name):
        """All of one generator's round on its own channel."""
        assert self.round_of(name).catch_up
        outputs = self.open_channel() + self.reply(name, "stage") + self.broadcast_done(of=name)
        return outputs + self.reply(name, "swap")


def messages(outputs, kind):
    sent = [output.message for output in outputs if isinstance(output, (ToGenerator, ToPublisher))]
    return [message for message in sent if isinstance(message, kind)]


def kinds(outputs, kind):
    return [output for output in outputs if isinstance(output, kind)]


def test_a_round_opens_a_channel_offers_swaps_and_commits():
    bench = Bench("a", "b")
    (open_channel,) = messages(bench.snapshot(0), OpenChannel)
    assert (open_channel.world_size, open_channel.prefix) == (3, "r/1/1")
    outputs = bench.open_channel()
    assert [offer.channel.rank for offer in messages(outputs, SyncOffer)] == [1, 2]
    assert len(messages(outputs, Broadcast)) == 1
    assert messages(bench.reply("a", "stage"), SyncSwap), "a swaps as soon as it staged, without waiting for b"
    bench.reply("b", "stage")
    bench.broadcast_done()
    (commit,) = kinds(bench.reply("a", "swap"), Committed)
    assert (commit.name, commit.version, commit.canary_max_diff) == ("a", 0, 0.0)
    outputs = bench.reply("b", "swap")
    assert messages(outputs, SyncCommit) and messages(outputs, SnapshotWanted)
    assert bench.planner.held_version("a") == bench.planner.held_version("b") == 0
    assert bench.round is None


def test_the_log_names_every_commit(caplog):
    bench = Bench("a", "b")
    with caplog.at_level("DEBUG"):
        bench.sync_all(7, ["a", "b"])
    said = [record.getMessage() for record in caplog.records if "committed" in record.getMessage()]
    assert said == [f"{name} (incarnation 1) committed version 7" for name in "ab"]


def test_the_channel_is_used_again_while_members_stay_the_same():
    bench = Bench("a")
    bench.sync_all(0, ["a"])
    outputs = bench.snapshot(1)
    assert messages(outputs, SyncOffer) and not messages(outputs, OpenChannel)


def test_a_restarted_generator_holds_nothing_and_gets_a_new_channel():
    bench = Bench("a")
    bench.sync_all(0, ["a"])
    bench.planner.joined("a", 2, 1, bench.now)
    assert bench.planner.held_version("a") is None
    bench.planner.advance(bench.now)
    (open_channel,) = messages(bench.take(), OpenChannel)
    assert open_channel.channel_epoch == 2


def test_a_joiner_is_caught_up_alone_while_others_hold_the_version():
    bench = Bench("a")
    bench.sync_all(0, ["a"])
    bench.planner.joined("b", 1, 1, bench.now)
    bench.planner.advance(bench.now)
    (open_channel,) = messages(bench.take(), OpenChannel)
    assert open_channel.world_size == 2
    assert list(bench.round.members) == ["b"]
    assert bench.planner.held_version("a") == 0


def test_a_newer_snapshot_is_asked_for_again_until_it_comes():
    bench = Bench()
    assert messages(bench.snapshot(0), SnapshotWanted), "nobody takes it"
    assert not messages(bench.after(WANTED_REPEAT_S - 0.1), SnapshotWanted)
    assert bench.planner.next_deadline(bench.now) == pytest.approx(bench.now + 0.1)
    for _ in range(2):
        assert [wanted.version for wanted in messages(bench.after(WANTED_REPEAT_S), SnapshotWanted)] == [0]
    assert [wanted.version for wanted in messages(bench.snapshot(1), SnapshotWanted)] == [1]


def test_the_repeated_wish_names_the_channels_in_use_so_that_others_whose_closing_got_lost_can_be_closed():
    bench = Bench("a", "b")
    bench.sync_all(0, ["a", "b"])
    bench.planner.joined("c", 1, 1, bench.now)
    bench.after(0.0)
    bench.open_channel()
    (wanted,) = messages(bench.after(WANTED_REPEAT_S), SnapshotWanted)
    assert wanted.open_channels == [1, bench.round_of("c").channel_epoch]
    bench.reply("c", "stage")
    bench.broadcast_done(of="c")
    bench.reply("c", "swap")
    (wanted,) = messages(bench.after(WANTED_REPEAT_S), SnapshotWanted)
    assert wanted.open_channels == [1], "the round of c is over"


def test_an_offer_that_is_repeated_starts_nothing():
    bench = Bench("a")
    bench.sync_all(0, ["a"])
    assert not bench.snapshot(0)
    bench.snapshot(1)
    current = bench.round
    assert not bench.snapshot(1) and not bench.snapshot(0)
    assert bench.round is current


def test_a_channel_that_keeps_a_version_whose_offer_got_lost_is_given_up_and_blames_nobody():
    bench = Bench("a")
    bench.sync_all(0, ["a"])
    bench.planner.joined("b", 1, 1, bench.now)
    bench.after(0.0)
    bench.planner.channel_ready(ChannelReady(bench.round.channel_epoch, "127.0.0.1", 9, "", version=1), bench.now)
    assert not messages(bench.take(), Broadcast) and not bench.planner.receivers["b"].failed
    assert messages(bench.snapshot(1) + bench.after(REOPEN_S), OpenChannel)


def test_while_a_cell_is_at_work_nothing_newer_is_asked_for():
    bench = Bench("a")
    assert not messages(bench.snapshot(0) + bench.open_channel(), SnapshotWanted)
    assert not messages(bench.reply("a", "stage") + bench.broadcast_done(), SnapshotWanted)
    assert messages(bench.reply("a", "swap"), SnapshotWanted)


def test_a_tensor_parallel_generator_takes_one_rank_per_worker():
    bench = Bench()
    bench.planner.joined("a", 1, 2, bench.now)
    bench.planner.joined("b", 1, 1, bench.now)
    (open_channel,) = messages(bench.snapshot(0), OpenChannel)
    assert open_channel.world_size == 4
    assert [offer.channel.rank for offer in messages(bench.open_channel(), SyncOffer)] == [1, 3]


def test_wrong_digests_never_reach_a_swap():
    bench = Bench("a")
    bench.snapshot(0)
    bench.open_channel()
    outputs = bench.reply("a", "stage", digests=[11, 23])
    assert not messages(outputs, SyncSwap)
    (failed,) = kinds(outputs, SyncFailed)
    assert "digest" in failed.reason
    assert bench.planner.held_version("a") is None


def test_a_wrong_canary_taints_and_never_commits():
    bench = Bench("a")
    bench.snapshot(0)
    bench.open_channel()
    bench.reply("a", "stage")
    bench.broadcast_done()
    wrong = [np.array([-1.0, -2.001], np.float32).tobytes()]
    outputs = bench.reply("a", "swap", canary=wrong)
    (abort,) = messages(outputs, SyncAbort)
    assert abort.tainted and not kinds(outputs, Committed)
    assert bench.planner.held_version("a") is None


def test_a_commit_reports_largest_and_mean_difference_over_all_canary_tokens():
    bench = Bench("a", tolerance=1.0)
    ours = [np.array([-1.0, -2.0], np.float32), np.array([-4.0], np.float32)]
    snapshot = SnapshotReady(0, manifest_of(0, DIGESTS), [b"", b""], [row.tobytes() for row in ours], 1.0)
    bench.planner.snapshot_ready(snapshot, bench.now)
    bench.planner.advance(bench.now)
    bench.open_channel()
    bench.reply("a", "stage")
    bench.broadcast_done()
    theirs = [np.array([-1.25, -2.0], np.float32), np.array([-3.5], np.float32)]
    (commit,) = kinds(bench.reply("a", "swap", canary=[row.tobytes() for row in theirs]), Committed)
    assert (commit.canary_max_diff, commit.canary_mean_diff) == (0.5, 0.25)


def test_a_nan_in_a_later_canary_sequence_is_not_lost():
    bench = Bench("a")
    bench.planner.snapshot_ready(SnapshotReady(0, manifest_of(0, DIGESTS), [b"", b""], CANARY * 2, 1.0), bench.now)
    bench.planner.advance(bench.now)
    bench.open_channel()
    bench.reply("a", "stage")
    bench.broadcast_done()
    outputs = bench.reply("a", "swap", canary=[*CANARY, np.array([-1.0, np.nan], np.float32).tobytes()])
    assert kinds(outputs, SyncFailed) and not kinds(outputs, Committed)


@pytest.mark.parametrize("canary", [[np.array([-1.0, np.nan], np.float32).tobytes()], [b""], []])
def test_a_canary_with_nan_or_missing_values_is_wrong(canary):
    bench = Bench("a")
    bench.snapshot(0)
    bench.open_channel()
    bench.reply("a", "stage")
    current = bench.round
    reply = SyncReply(1, current.snapshot.version, current.attempt, SyncPhase.SWAP, "", canary_logprobs=canary)
    reply.in_use.append(BitsInUse(0, 9, [], []))
    bench.planner.reply("a", reply, bench.now)
    assert kinds(bench.take(), SyncFailed)


def test_repeated_taints_are_fatal_for_that_generator():
    bench = Bench("a")
    bench.snapshot(0)
    fatal = []
    for _ in range(MAX_TAINTS):
        bench.open_channel()
        bench.reply("a", "stage")
        bench.broadcast_done()
        outputs = bench.reply("a", "swap", error="engine says no")
        fatal.append(kinds(outputs, SyncFailed)[0].fatal)
        bench.after(1000.0)
    assert fatal == [False, False, True]


def test_a_silent_member_costs_the_others_one_deadline_and_then_sits_out():
    bench = Bench("a", "b")
    bench.snapshot(0)
    bench.open_channel()
    bench.reply("a", "stage", error="collective failed")  # a is the victim of b's silence
    outputs = bench.after(GRACE_S + 0.1)
    assert {f.name for f in kinds(outputs, SyncFailed)} == {"b"}
    assert bench.round is not None, "the publisher is still in the broken collective"
    outputs = bench.broadcast_done(error="timeout")
    (open_channel,) = messages(outputs, OpenChannel)
    assert open_channel.world_size == 2 and list(bench.round.members) == ["a"]
    assert messages(outputs, CloseChannel), "nobody uses the broken one again"
    bench.open_channel()
    bench.reply("a", "stage")
    bench.broadcast_done()
    assert kinds(bench.reply("a", "swap"), Committed)
    outputs = bench.after(PENALTY_S)
    assert messages(outputs, OpenChannel) and list(bench.round.members) == ["b"] and bench.round.catch_up


def test_a_member_that_dies_in_the_middle_does_not_hold_up_the_round():
    bench = Bench("a", "b")
    bench.snapshot(0)
    bench.open_channel()
    bench.reply("a", "stage")
    bench.reply("b", "stage")
    bench.broadcast_done()
    bench.reply("a", "swap")
    bench.planner.left("b", bench.now, "no beat for 15 s")
    assert bench.round is None and bench.planner.held_version("a") == 0


def test_no_answer_to_a_swap_taints_after_the_deadline():
    bench = Bench("a")
    bench.sync_all(0, ["a"])
    bench.snapshot(1)
    bench.reply("a", "stage")
    bench.broadcast_done()
    assert bench.planner.held_version("a") is None, "between swap and commit it holds no version"
    outputs = bench.after(TIMEOUT_S + GRACE_S)
    assert messages(outputs, SyncAbort)[0].tainted
    assert bench.planner.held_version("a") is None


def test_the_trainers_death_ends_the_round_and_the_next_trainer_starts_anew():
    bench = Bench("a")
    bench.snapshot(0)
    bench.open_channel()
    bench.planner.publisher_lost(bench.now)
    assert bench.round is None
    assert messages(bench.snapshot(0), OpenChannel)


def test_a_publisher_that_opens_no_channel_is_given_up_by_deadline():
    bench = Bench("a")
    bench.snapshot(0)
    outputs = bench.after(TIMEOUT_S)
    assert "opened no channel" in kinds(outputs, SyncFailed)[0].reason
    assert bench.round is not None, "it is tried again at once under a new epoch"
    assert bench.planner.channel_epoch == 2


def test_a_busy_generator_is_left_alone_until_it_is_free():
    bench = Bench("a", "b")
    bench.planner.set_busy({"a"})
    bench.sync_all(0, ["b"])
    assert bench.planner.held_version("a") is None
    bench.planner.set_busy(set())
    assert messages(bench.after(0.0), OpenChannel)
    assert list(bench.round.members) == ["a"]


def test_replies_of_another_round_or_phase_are_ignored():
    bench = Bench("a")
    bench.snapshot(0)
    bench.open_channel()
    current = bench.round
    for stale in (
        SyncReply(1, 7, current.attempt, SyncPhase.STAGE, "", digests=[DIGESTS]),
        SyncReply(1, current.snapshot.version, current.attempt + 1, SyncPhase.STAGE, "", digests=[DIGESTS]),
        SyncReply(1, current.snapshot.version, current.attempt, SyncPhase.SWAP, "", canary_logprobs=CANARY),
    ):
        bench.planner.reply("a", stale, bench.now)
    assert not messages(bench.take(), SyncSwap)


def test_every_wait_has_a_deadline():
    bench = Bench("a", "b")
    bench.snapshot(0)
    assert bench.planner.next_deadline(bench.now) == bench.now + TIMEOUT_S
    bench.open_channel()
    assert bench.planner.next_deadline(bench.now) is not None
    bench.reply("a", "stage")
    bench.reply("b", "stage")
    assert bench.planner.next_deadline(bench.now) is not None


def test_a_snapshot_that_is_replaced_while_its_channel_opens_gives_way_to_the_newer_one():
    """The publisher was told that it may replace it, and had done so before it read that a channel is wanted."""
    bench = Bench("a")
    bench.sync_all(1, ["a"])
    bench.planner.joined("b", 1, 1, bench.now)
    assert messages(bench.after(0.0), OpenChannel)
    bench.planner.set_busy({"a"})
    bench.snapshot(2)
    outputs = bench.open_channel()
    assert [(offer.version, offer.attempt) for offer in messages(outputs, SyncOffer)] == [(2, 0)]
    assert [broadcast.version for broadcast in messages(outputs, Broadcast)] == [2]
    bench.reply("b", "stage")
    bench.broadcast_done()
    bench.reply("b", "swap")
    assert bench.planner.held_version("b") == 2


def test_a_member_that_errs_again_and_again_sits_out_in_the_end():
    bench = Bench("a")
    bench.snapshot(0)
    for failures in range(1, MAX_ERRORS + 1):
        bench.open_channel()
        bench.reply("a", "stage", error="disk of the store is on fire")
        bench.broadcast_done(error="a member left")
        bench.after(0.0)
        assert (bench.round is None) == (failures == MAX_ERRORS)
    assert messages(bench.after(PENALTY_S), OpenChannel)


def test_a_member_that_dies_while_it_stages_ends_the_wait_of_the_others():
    bench = Bench("a", "b", "c")
    bench.snapshot(0)
    bench.open_channel()
    bench.reply("a", "stage")
    bench.planner.left("b", bench.now, "is dead")
    outputs = bench.after(0.0)
    assert [f.name for f in kinds(outputs, SyncFailed)] == ["b", "c"]
    assert len(messages(outputs, SyncAbort)) == 2
    assert not bench.planner.receivers["c"].failed, "it is not to blame"
    assert kinds(bench.reply("a", "swap"), Committed), "a had all it needs"
    assert list(bench.round.members) == ["c"]


def test_a_member_that_dies_while_its_channel_opens_is_not_waited_for():
    bench = Bench("a", "b")
    bench.snapshot(0)
    bench.planner.left("b", bench.now, "is dead")
    (open_channel,) = messages(bench.after(0.0), OpenChannel)
    assert open_channel.world_size == 2 and list(bench.round.members) == ["a"]


def test_a_failure_names_ranks_deadline_and_what_happens_next():
    bench = Bench()
    bench.planner.joined("a", 1, 2, bench.now)
    bench.snapshot(0)
    bench.open_channel()
    bench.broadcast_done()
    (failed,) = kinds(bench.after(TIMEOUT_S + GRACE_S), SyncFailed)
    assert (failed.name, failed.phase) == ("a", "stage")
    assert failed.reason == "ranks 1 to 2: no answer within 11 s; 100 bytes were sent"
    assert failed.remedy == "tried again in 5 s, on a channel of its own"


def test_wrong_digests_name_the_worker():
    bench = Bench()
    bench.planner.joined("a", 1, 2, bench.now)
    bench.snapshot(0)
    bench.open_channel()
    current = bench.round
    reply = SyncReply(1, 0, current.attempt, SyncPhase.STAGE, "", digests=[DIGESTS, [11, 23]])
    bench.planner.reply("a", reply, bench.now)
    (failed,) = kinds(bench.take(), SyncFailed)
    assert "(digest) on rank 2" in failed.reason


def test_a_wait_that_was_cut_short_says_how_long_it_was_and_why():
    bench = Bench("a", "b")
    bench.snapshot(0)
    bench.open_channel()
    bench.after(0.5)
    bench.broadcast_done(error="connection reset by peer")
    failed = kinds(bench.after(GRACE_S), SyncFailed)
    why = "the last 1 s after the publisher failed: connection reset by peer"
    assert [f.reason for f in failed] == [
        f"rank {rank}: no answer within 1.5 s, {why}; 100 bytes were sent" for rank in (1, 2)
    ]


def test_a_broadcast_that_does_not_end_is_logged(caplog):
    bench = Bench("a")
    bench.snapshot(0)
    bench.open_channel()
    bench.reply("a", "stage")
    bench.reply("a", "swap")
    bench.after(TIMEOUT_S + GRACE_S)
    assert "the publisher did not say within 11 s how its broadcast ended" in caplog.text
    assert bench.planner.held_version("a") == 0


def test_a_publisher_that_cannot_open_a_channel_is_asked_again_after_a_pause_and_costs_the_members_nothing():
    bench = Bench("a")
    bench.snapshot(0)
    for _ in range(MAX_ERRORS + 1):
        bench.planner.channel_ready(
            ChannelReady(bench.round.channel_epoch, "127.0.0.1", 0, "no port is free"), bench.now
        )
        assert bench.round is None
        assert not messages(bench.after(0.0), OpenChannel), "not at once: that would go round and round"
        assert bench.planner.next_deadline(bench.now) <= bench.now + REOPEN_S
        assert messages(bench.after(REOPEN_S), OpenChannel)
    assert not bench.planner.receivers["a"].failed


def test_a_generator_that_was_caught_up_goes_on_alone_while_evaluations_keep_all_cells_from_swapping():
    bench = Bench("a")
    bench.sync_all(0, ["a"])
    bench.planner.joined("b", 1, 1, bench.now)
    bench.after(0.0)
    bench.catch_up("b")
    bench.planner.set_busy({"a"})
    for version in (1, 2):
        bench.snapshot(version)
        bench.catch_up("b")
        assert bench.planner.held_version("b") == version
    bench.planner.set_busy(set())
    bench.snapshot(3)
    assert set(bench.round.members) == {"a", "b"}, "one cell again"


# -- cells and catching up


def test_generators_that_are_there_from_the_start_share_cells_of_the_given_size():
    bench = Bench(*"abcde", cell_size=2)
    opened = messages(bench.snapshot(0), OpenChannel)
    assert [channel.world_size for channel in opened] == [3, 3, 2]
    assert len({channel.prefix for channel in opened}) == 3
    offers = messages(bench.open_channel(), SyncOffer)
    assert sorted(offer.channel.rank for offer in offers) == [1, 1, 1, 2, 2]


def test_a_cell_that_hangs_stalls_the_others_for_the_grace_of_cells_only():
    bench = Bench("a", "b", cell_size=1)
    bench.snapshot(0)
    bench.open_channel()
    bench.reply("a", "stage")
    bench.broadcast_done(of="a")
    assert kinds(bench.reply("a", "swap"), Committed)
    assert bench.planner.next_deadline(bench.now) == bench.now + CELL_GRACE_S
    assert messages(bench.after(CELL_GRACE_S), SnapshotWanted)
    outputs = bench.snapshot(1)
    assert [output.name for output in outputs if isinstance(output, ToGenerator)] == ["a"], "its channel is open still"
    bench.reply("a", "stage")
    bench.broadcast_done(of="a")
    bench.reply("a", "swap")
    assert bench.planner.held_version("a") == 1 and bench.round_of("b").snapshot.version == 0


def test_a_late_cell_takes_the_newest_snapshot_on_a_new_channel():
    """Its memory may be replaced at any moment, so that the channel has to ask for it first."""
    bench = Bench("a", "b", cell_size=1)
    bench.snapshot(0)
    bench.open_channel()
    for name in ("a", "b"):
        bench.reply(name, "stage")
        bench.broadcast_done(of=name)
    bench.reply("a", "swap")
    bench.after(CELL_GRACE_S)
    bench.snapshot(1)
    bench.reply("a", "stage")
    bench.broadcast_done(of="a")
    assert messages(bench.reply("a", "swap") + bench.after(CELL_GRACE_S), SnapshotWanted)
    outputs = bench.reply("b", "swap")
    assert messages(outputs, OpenChannel) and not messages(outputs, SyncOffer)
    assert messages(bench.open_channel(), SyncOffer)[0].version == 1


def test_a_newcomer_is_caught_up_beside_a_round_and_merged_at_the_next_snapshot():
    bench = Bench("a")
    bench.sync_all(0, ["a"])
    bench.snapshot(1)
    bench.planner.joined("b", 1, 1, bench.now)
    (open_channel,) = messages(bench.after(0.0), OpenChannel)
    assert open_channel.world_size == 2 and bench.round_of("b").catch_up
    bench.reply("a", "stage")
    bench.broadcast_done(of="a")
    assert messages(bench.reply("a", "swap"), SnapshotWanted), "the newcomer is not waited for"
    assert kinds(bench.catch_up("b"), Committed)
    (open_channel,) = messages(bench.snapshot(2), OpenChannel)
    assert open_channel.world_size == 3 and set(bench.round.members) == {"a", "b"}


def test_a_newcomer_that_is_caught_up_waits_for_the_next_snapshot_and_not_for_another_round_of_its_own():
    bench = Bench("a")
    bench.sync_all(0, ["a"])
    bench.planner.joined("b", 1, 1, bench.now)
    bench.after(0.0)
    bench.open_channel()
    bench.snapshot(1)  # while b still gets 0
    bench.reply("b", "stage")
    bench.broadcast_done(of="b")
    bench.reply("b", "swap")
    assert bench.planner.held_version("b") == 0
    assert list(bench.planner.rounds) == [bench.round_of("a").channel_epoch]


def test_who_failed_where_others_did_not_is_tried_alone_and_costs_them_nothing():
    bench = Bench("a", "b")
    bench.sync_all(0, ["a", "b"])
    bench.snapshot(1)
    bench.reply("a", "stage")
    bench.reply("b", "stage", error="no memory")
    bench.broadcast_done()
    bench.reply("a", "swap")
    assert list(bench.round.members) == ["b"] and bench.round.catch_up
    outputs = bench.snapshot(2)
    assert [output.name for output in outputs if isinstance(output, ToGenerator)] == []
    assert messages(outputs, OpenChannel)[0].world_size == 2, "a goes on alone"


def test_no_more_catch_ups_at_once_than_the_network_should_carry():
    bench = Bench("a", cell_size=1)
    bench.sync_all(0, ["a"])
    for name in "bcdefgh":
        bench.planner.joined(name, 1, 1, bench.now)
    assert len(messages(bench.after(0.0), OpenChannel)) == MAX_CATCH_UPS
    assert len(messages(bench.catch_up("b"), OpenChannel)) == 1, "the next in line"


# -- what generators say they hold


def test_a_lost_commit_is_said_again_and_then_the_weights_are_sent_again():
    bench = Bench("a")
    bench.sync_all(0, ["a"])
    bench.planner.holds("a", None, bench.now + COMMIT_REPEAT_S)
    assert not bench.take(), "the beat may be older than the commit"
    bench.planner.holds("a", None, bench.now + COMMIT_REPEAT_S + 0.1)
    (commit,) = messages(bench.take(), SyncCommit)
    assert (commit.version, commit.attempt) == (0, 0)
    bench.planner.holds("a", None, bench.now + TIMEOUT_S + COMMIT_REPEAT_S + 0.1)
    assert bench.planner.held_version("a") is None
    assert messages(bench.after(0.0), OpenChannel)


def test_a_generator_that_holds_what_it_proved_is_left_alone():
    bench = Bench("a")
    bench.sync_all(0, ["a"])
    bench.planner.holds("a", 0, bench.now + 1000.0)
    assert not bench.take() and bench.planner.held_version("a") == 0


# -- deltas


def test_a_delta_goes_out_when_every_member_has_staged_its_base():
    bench = Bench("a", "b")
    bench.sync_all(0, ["a", "b"])
    assert bench.offered(bench.snapshot(1, base=0)) == 0


def test_a_round_reports_what_was_sent():
    bench = Bench("a")
    bench.sync_all(0, ["a"])
    bench.snapshot(1, base=0)
    current = bench.round
    bench.reply("a", "stage")
    done = BroadcastDone(1, current.attempt, current.channel_epoch, "", 5.0, 100, 4000, 2.5)
    bench.planner.broadcast_done(done, bench.now)
    (ended,) = kinds(bench.reply("a", "swap"), RoundEnded)
    assert (ended.base_version, ended.num_bytes, ended.dense_bytes, ended.encode_ms) == (0, 100, 4000, 2.5)


@pytest.mark.parametrize("base", [None, 0, 2])
def test_without_a_delta_to_the_version_that_is_staged_everything_is_sent(base):
    bench = Bench("a")
    bench.sync_all(0, ["a"])
    bench.sync_all(1, ["a"])
    assert bench.offered(bench.snapshot(3, base=base)) is None


def test_a_member_without_the_base_makes_the_round_dense():
    bench = Bench("a")
    bench.sync_all(0, ["a"])
    bench.sync_all(1, ["a"])
    bench.planner.joined("b", 1, 1, bench.now)
    bench.after(0.0)
    bench.catch_up("b")
    bench.planner.receivers["b"].staged_version = 0
    assert bench.offered(bench.snapshot(2, base=1)) is None


def test_a_generator_that_was_caught_up_takes_deltas_with_the_others():
    bench = Bench("a")
    bench.sync_all(0, ["a"])
    bench.planner.joined("b", 1, 1, bench.now)
    bench.after(0.0)
    bench.catch_up("b")
    assert bench.offered(bench.snapshot(1, base=0)) == 0
    assert set(bench.round.members) == {"a", "b"}


def test_a_restarted_generator_has_no_base():
    bench = Bench("a")
    bench.sync_all(0, ["a"])
    bench.planner.joined("a", 2, 1, bench.now)
    assert bench.offered(bench.snapshot(1, base=0)) is None


@pytest.mark.parametrize("fault", ["error", "digest", "silence"])
def test_after_a_stage_that_failed_everything_is_sent(fault):
    bench = Bench("a")
    bench.sync_all(0, ["a"])
    assert bench.offered(bench.snapshot(1, base=0)) == 0
    bench.broadcast_done()
    if fault == "silence":
        bench.after(TIMEOUT_S + GRACE_S)
    else:
        wrong = {"error": "no base"} if fault == "error" else {"digests": [11, 23]}
        bench.reply("a", "stage", **wrong)
    assert bench.offered(bench.after(PENALTY_S)) is None


def test_after_a_taint_everything_is_sent():
    bench = Bench("a")
    bench.sync_all(0, ["a"])
    bench.snapshot(1, base=0)
    bench.reply("a", "stage")
    bench.broadcast_done()
    bench.reply("a", "swap", error="engine says no")
    assert not messages(bench.snapshot(2, base=1), OpenChannel), "it sits out"
    assert bench.offered(bench.after(PENALTY_S)) is None


def test_who_failed_does_not_cost_the_others_their_base():
    bench = Bench("a", "b")
    bench.sync_all(0, ["a", "b"])
    bench.snapshot(1, base=0)
    bench.reply("a", "stage")
    bench.reply("b", "stage", digests=[11, 23])
    bench.broadcast_done()
    bench.reply("a", "swap")
    outputs = bench.snapshot(2, base=1)
    assert list(bench.round.members) == ["a"], "b sits out"
    assert bench.offered(outputs) == 1


def test_a_channel_that_could_not_be_opened_costs_nobody_its_base():
    bench = Bench("a", "b")
    bench.sync_all(0, ["a", "b"])
    bench.planner.left("b", bench.now, "gone")
    bench.snapshot(1, base=0)
    outputs = bench.after(TIMEOUT_S)
    assert kinds(outputs, SyncFailed)
    assert bench.offered(outputs) == 0


def test_another_trainers_version_of_the_same_number_is_no_base():
    bench = Bench("a")
    bench.sync_all(0, ["a"])
    bench.planner.publisher_lost(bench.now)
    assert bench.offered(bench.snapshot(1, base=0)) is None


def test_the_next_trainers_version_of_the_same_number_is_sent_again_only_if_it_has_other_bytes():
    bench = Bench("a")
    bench.sync_all(0, ["a"])
    bench.planner.publisher_lost(bench.now)
    assert not messages(bench.snapshot(0), OpenChannel), "it was repeated to the bit"
    bench.planner.publisher_lost(bench.now)
    other = SnapshotReady(0, manifest_of(0, [7, 8]), [b"\x01\0\0\0"], CANARY, 1.0)
    bench.planner.snapshot_ready(other, bench.now)
    assert messages(bench.after(0.0), OpenChannel)
    bench.open_channel()
    bench.reply("a", "stage", digests=[7, 8])
    bench.broadcast_done()
    assert kinds(bench.reply("a", "swap"), Committed)
    assert not messages(bench.after(1.0), SyncOffer), "it holds it"


def test_an_answer_to_the_learner_before_this_one_is_ignored():
    bench = Bench("a")
    bench.offered(bench.snapshot(0))
    bench.planner.reply("a", SyncReply(0, 0, bench.round.attempt, SyncPhase.STAGE, "", [DIGESTS]), bench.now)
    assert not messages(bench.after(0.0), SyncSwap)


@pytest.mark.parametrize("digests", [[], [DIGESTS], [DIGESTS] * 3, [DIGESTS, [11]]])
def test_every_worker_of_a_generator_has_to_show_its_digests(digests):
    bench = Bench()
    bench.planner.joined("a", 1, 2, bench.now)
    bench.offered(bench.snapshot(0))
    current = bench.round
    bench.planner.reply("a", SyncReply(1, 0, current.attempt, SyncPhase.STAGE, "", digests), bench.now)
    assert kinds(bench.take(), SyncFailed)


def at(*gpus, machine="host", memory="1@1"):
    return Placement(machine, memory, gpus)


def test_cells_hold_generators_of_one_backend_and_a_card_once():
    bench = Bench()
    bench.planner.trainer_joined(at("gpu-0"))
    placed = {"a": at("gpu-1"), "b": at("gpu-2"), "c": at("gpu-1"), "d": at("gpu-0"), "e": at(), "f": at(machine="x")}
    for name, placement in placed.items():
        bench.planner.joined(name, 1, 1, bench.now, placement)
    opened = {(order.backend, order.world_size) for order in messages(bench.snapshot(0), OpenChannel)}
    members = {frozenset(current.members) for current in bench.planner.rounds.values()}
    assert members == {frozenset("ab"), frozenset("c"), frozenset("d"), frozenset("ef")}
    assert opened == {("nccl", 3), ("nccl", 2), ("ipc", 2), ("gloo", 3)}


def test_a_generator_that_weights_cannot_reach_is_sent_away_when_the_trainer_says_where_it_is():
    bench = Bench()
    bench.planner.joined("a", 1, 1, bench.now, at("gpu-0", memory="2@2"))
    bench.planner.joined("b", 1, 1, bench.now, at("gpu-1"))
    assert bench.take() == []
    bench.planner.trainer_joined(at("gpu-0"))
    (refused,) = kinds(bench.take(), Unreachable)
    assert refused.name == "a" and "one user in one PID namespace" in refused.reason
    bench.planner.trainer_joined(at("gpu-0"))  # the same trainer place again is no news
    assert bench.take() == []


def test_a_trainer_in_another_place_finds_no_cells():
    bench = Bench()
    bench.planner.trainer_joined(at())
    for name, placement in {"a": at("gpu-1"), "b": at()}.items():
        bench.planner.joined(name, 1, 1, bench.now, placement)
    bench.sync_all(0, ["a", "b"])
    bench.planner.publisher_lost(bench.now)
    bench.planner.trainer_joined(at("gpu-0"))
    opened = messages(bench.snapshot(1), OpenChannel)
    assert {(order.backend, order.world_size) for order in opened} == {("nccl", 2), ("gloo", 2)}


@pytest.mark.parametrize(("gpus", "passes"), [((), False), (("gpu-1",), True)])
def test_the_canary_of_a_gpu_has_a_limit_of_its_own(gpus, passes):
    bench = Bench(gpu_tolerance=0.02)
    bench.planner.trainer_joined(at())
    bench.planner.joined("a", 1, 1, bench.now, at(*gpus))
    bench.offered(bench.snapshot(0))
    bench.reply("a", "stage")
    bench.broadcast_done()
    near = [np.array([-1.0, -2.001], np.float32).tobytes()]
    bench.reply("a", "swap", canary=near)
    assert (bench.planner.held_version("a") == 0) is passes


def test_no_delta_goes_to_a_generator_of_several_workers_nor_to_its_cell():
    bench = Bench("a")
    bench.planner.joined("b", 1, 2, bench.now)
    for version in (0, 1):
        base = bench.offered(bench.snapshot(version, base=version - 1 if version else None))
        assert base is None
        bench.reply("a", "stage")
        current = bench.round
        for phase, fields in (("stage", {"digests": [DIGESTS] * 2}), ("swap", {})):
            if phase == "swap":
                fields = {"canary_logprobs": CANARY, "in_use": [BitsInUse(version, 9, [], [])] * 2}
                bench.broadcast_done()
                bench.reply("a", "swap")
            reply = SyncReply(1, version, current.attempt, SyncPhase(phase), "", **fields)
            bench.planner.reply("b", reply, bench.now)
            bench.after(0.0)
        assert [bench.planner.held_version(name) for name in "ab"] == [version] * 2
