"""A batch that kills the trainer each time: named at the end, or left out where the user wants the run to go on.

Deaths are counted for the version that is being made: steps that are trained again from the journal on the way to it
are no progress. The batch is to blame when every one of these deaths came after it was dealt out.
"""

from __future__ import annotations

import logging

from asyncrl.config import Config
from asyncrl.desk.batches import BatchDealer, DealtBatch
from asyncrl.desk.run_state import RunState
from asyncrl.desk.trainer_process import TrainerProcess
from asyncrl.errors import TrainerFailed
from asyncrl.storage.records import BatchSkipped

log = logging.getLogger(__name__)

MAX_NAMED = 32  # ordinals in a message


class BadBatches:
    """Watches what the trainer had in hand when it died, and decides what follows when it died too often."""

    def __init__(self, config: Config, *, state: RunState, dealer: BatchDealer, process: TrainerProcess) -> None:
        self._skips = config.learner.on_bad_batch == "skip"
        self._state = state
        self._dealer = dealer
        self._process = process
        self._in_hand: list[DealtBatch | None] = []  # at each death since the last new version

    def stepped(self, version: int) -> None:
        """A rank made `version`. Deaths before count no more, unless it is a version that was made before."""
        self._dealer.step_made(version)
        if version > self._state.policy.trained:
            self._in_hand.clear()
            self._process.stepped()

    def trainer_died(self, now: float) -> bool:
        """Whether the trainer has died; it is started again with a back-off, without the batch that is to blame.

        Raises TrainerFailed when it died too often and no batch may be left out, and what `TrainerProcess.poll` raises.
        """
        in_hand = self._dealer.in_hand
        try:
            if not self._process.poll(now):
                return False
        except TrainerFailed as error:
            self._in_hand.append(in_hand)
            self._leave_out_or_raise(error, now)
            return True
        self._in_hand.append(in_hand)
        return True

    def _leave_out_or_raise(self, error: TrainerFailed, now: float) -> None:
        batch = self._in_hand[-1]
        if batch is None or any(other != batch for other in self._in_hand):
            raise error
        ordinals = [ordinal for ordinal, _ in batch.groups]
        named = ", ".join(map(str, ordinals[:MAX_NAMED])) + (" ..." if len(ordinals) > MAX_NAMED else "")
        what = (
            f"each time while making version {batch.version + 1} of the {len(ordinals)} prompts with ordinals {named}"
        )
        is_newest = batch.version == self._state.policy.trained and not self._dealer.has_steps_after(batch.version)
        if not self._skips or not is_newest:
            remedy = (
                "if memory ran out, lower learner.micro_batch_tokens or sampling.max_new_tokens; "
                "learner.on_bad_batch=skip leaves these prompts out and goes on with others"
            )
            raise TrainerFailed(f"{error}\n{what}. The same batch comes first again: {remedy}")
        reason = f"the trainer died {len(self._in_hand)} times, {what}"
        log.error("learner.on_bad_batch=skip: this batch is left out, its prompts are not trained on: %s", reason)
        self._state.journal.append(BatchSkipped(batch.version, batch.groups, reason[:1000]), now)
        self._state.journal.make_durable()
        self._state.leases.leave_out(ordinals)
        self._state.policy.batch_left_out(batch.version)
        self._dealer.leave_out(batch.version)
        self._in_hand.clear()
        self._process.start_over(now)
