"""The process that writes rollouts: it makes text of tokens, and lines of what the desk sends.

It gives way to everything else on its host. A tokenizer that fails leaves the text out, a disk that fails the file;
either is said once. Nothing here imports torch.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from asyncrl.host.pipes import private_pipes, read_frame
from asyncrl.host.processes import tie_to_parent
from asyncrl.host.tokenizer import load_tokenizer
from asyncrl.report.rollouts.files import LARGEST_SHARE, file_of, remove_partial, trim, write_file
from asyncrl.report.rollouts.jobs import WriterSetup, WrittenJob
from asyncrl.report.rollouts.records import KeptRollout, record_of
from asyncrl.report.rollouts.token_texts import token_texts_of

log = logging.getLogger(__name__)

T = TypeVar("T")

NICE = 5  # training and generation come first


def main() -> None:
    """Serves the daemon until that closes the pipe."""
    if not tie_to_parent():
        return
    jobs, _ = private_pipes()
    os.nice(NICE)
    _go_first_when_memory_is_short()
    frame = read_frame(jobs)
    if frame is None:
        return
    setup = WriterSetup.decode(frame)
    logging.basicConfig(level=setup.level.upper(), format="%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S")
    files = RolloutFiles(setup)
    while (frame := read_frame(jobs)) is not None:
        files.write(WrittenJob.decode(frame))


class Texts:
    """The text of tokens, by the tokenizer of the model; None where that fails, which is said once."""

    def __init__(self, model_path: str) -> None:
        self._model_path = model_path
        self._tokenizer: Any = None  # loaded when it is needed first: that takes seconds
        self._failed = False

    def plain(self, token_ids: Sequence[int]) -> str | None:
        """As a reward sees it: without special tokens."""
        return self._tried(lambda: self._decode(token_ids, skip_special_tokens=True))

    def whole(self, token_ids: Sequence[int]) -> str | None:
        """With special tokens."""
        return self._tried(lambda: self._decode(token_ids))

    def token_texts(self, token_ids: Sequence[int]) -> list[str] | None:
        """Of each token; None also where the text cannot be cut by tokens."""
        return self._tried(lambda: token_texts_of(token_ids, self._decode))

    def _decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        if self._tokenizer is None:
            # What `PreTrainedTokenizerFast.decode` comes to: it is called for every token.
            self._tokenizer = load_tokenizer(self._model_path).backend_tokenizer
        text: str = self._tokenizer.decode(list(token_ids), skip_special_tokens=skip_special_tokens)
        return text

    def _tried(self, make: Callable[[], T]) -> T | None:
        if self._failed:
            return None
        try:
            return make()
        # Broad, because a tokenizer's library raises errors of its own, and none of them may cost more than the text.
        except Exception as error:  # noqa: BLE001
            self._failed = True
            log.warning("rollouts are written without their text: %s: %s", type(error).__name__, error)
            return None


class RolloutFiles:
    """Writes the file of each job, within the size that the folder may have."""

    def __init__(self, setup: WriterSetup) -> None:
        self._folder = Path(setup.folder)
        self._max_bytes = setup.max_bytes
        self._texts = Texts(setup.model_path)
        self._failed = False
        self._said_too_large = False

    def write(self, job: WrittenJob) -> None:
        """Writes one file. A disk that refuses it costs that file, and is said once until one is written again."""
        try:
            self._write(job)
        except OSError as error:
            if not self._failed:
                log.warning("%s: rollouts cannot be written (%s); training goes on", self._folder, error)
            self._failed = True
            return
        self._failed = False

    def _write(self, job: WrittenJob) -> None:
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        remove_partial(self._folder)
        file = file_of(self._folder, job.kind, job.version)
        left_out = write_file(file, self._lines(job), self._max_bytes // LARGEST_SHARE)
        trim(self._folder, self._max_bytes, file)
        if left_out and not self._said_too_large:
            self._said_too_large = True
            log.warning(
                "%s lacks %d of %d rollouts: they would not fit into a quarter of log.rollouts_max_mib; raise it, or "
                "lower log.rollouts_per_step or log.rollouts_per_eval (said once)",
                file.path, left_out, len(job.rollouts),
            )  # fmt: skip

    def _lines(self, job: WrittenJob) -> Iterator[bytes]:
        for entry in job.rollouts:
            kept = KeptRollout.from_bytes(entry.body)
            token_ids = kept.rollout.token_ids.tolist()
            record = record_of(
                kept,
                kind=job.kind,
                version=job.version,
                generator=entry.generator,
                payload=None if entry.payload is None else json.loads(entry.payload),
                prompt=self._texts.whole(kept.prompt_ids.tolist()),
                completion=self._texts.plain(token_ids),
                token_texts=self._texts.token_texts(token_ids),
            )
            yield record.to_line()


def _go_first_when_memory_is_short() -> None:
    """If the host runs out of memory, this process goes before a daemon does."""
    with open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")


if __name__ == "__main__":
    main()
