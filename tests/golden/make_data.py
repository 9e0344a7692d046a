"""Makes all stored data of the golden tests again. Run by hand only, and only when behaviour is meant to change:

python tests/golden/make_data.py [journal|steps|frames|dry_run|old_run ...]

Without arguments everything is made. Steps are computed from the journal as it is stored.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.golden import product, test_dry_run, test_steps
from tests.golden.stored import DATA, DRY_RUN, JOURNAL, OLD_RUN, copy_of, read_json, write_arrays, write_json

FIRST_VERSION = 3
METRICS = (
    "loss", "policy_loss", "grad_norm", "critic_grad_norm", "value_loss", "entropy", "kl_reference", "ratio_mean",
    "clip_fraction", "cap_fraction", "ess_share", "explained_variance", "masked_share", "micro_batches", "lr",
)  # fmt: skip


def random_rollout(rng, trainer, prompt, version, *, flat):
    """A completion sampled under one to three versions up to `version`, by a policy a bit off the initial one."""
    length = int(rng.integers(1, 11))
    tokens = rng.integers(0, 40, length).tolist()
    logprobs = product.score(trainer, [*prompt, *tokens])[len(prompt) - 1 :] + 0.25 * rng.standard_normal(length)
    cuts = sorted(rng.choice(range(1, length), min(int(rng.integers(0, 3)), length - 1), replace=False).tolist())
    edges, oldest = [0, *cuts, length], version - int(rng.integers(len(cuts), 4))
    return {
        "tokens": tokens,
        "logprobs": np.minimum(logprobs, 0.0),
        "spans": [(start, stop, oldest + n) for n, (start, stop) in enumerate(zip(edges, edges[1:], strict=False))],
        "finish": "stop" if rng.random() < 0.7 else "length",
        "reward": 0.5 if flat else float(rng.integers(0, 2)) + 0.1 * length,
        "parts": {"exact": float(rng.integers(0, 2)), "length": 0.1 * length},
    }


def make_entries(rng, steps, first_ordinal=0):
    """Journal records of `steps` steps of three groups of four each; one group in five has equal rewards."""
    trainer, entries, ordinal = product.new_trainer("grpo", version=0), [], first_ordinal
    for version in range(FIRST_VERSION, FIRST_VERSION + steps):
        keys = []
        for _ in range(3):
            prompt = rng.integers(0, 40, rng.integers(2, 9)).tolist()
            flat = ordinal % 5 == 4
            rollouts = [random_rollout(rng, trainer, prompt, version, flat=flat) for _ in range(4)]
            group = product.make_group(ordinal, ordinal % 3 % 2, prompt, rollouts, 0.25 if ordinal % 2 else None)
            entries.append(product.stored_group(group, seq=ordinal + 1))
            keys.append((ordinal, ordinal % 3 % 2))
            ordinal += 1
        entries.append(product.step_taken(version, keys))
    return entries


def make_journal():
    shutil.rmtree(JOURNAL, ignore_errors=True)
    product.write_journal(JOURNAL, make_entries(np.random.default_rng(7), 10))


def make_steps():
    with tempfile.TemporaryDirectory() as parent:
        batches = list(product.batches_of(product.read_journal(copy_of(JOURNAL, Path(parent)))))
    expected = {}
    for method in product.METHODS:
        metrics, weights = test_steps.run(method, batches)
        expected[method] = [{name: step[name] for name in METRICS if name in step} for step in metrics]
        write_arrays(f"weights_{method}.npz", weights)
    write_json("steps.json", expected)


def make_frames():
    # Emptied first: the tests' module reads them when it is imported.
    for name, value in (("frames.json", {}), ("records.json", {"records": {}, "segments": {}})):
        if not (DATA / name).exists():
            write_json(name, value)
    from tests.golden.test_frames import MESSAGES, RECORD_OF_KIND, SALT, known_salt

    write_json(
        "frames.json", {str(code): product.encode_message(message).hex() for code, message in sorted(MESSAGES.items())}
    )
    with tempfile.TemporaryDirectory() as parent, pytest.MonkeyPatch.context() as monkeypatch:
        journal = Path(parent) / "journal"
        known_salt(monkeypatch)
        product.write_journal(journal, product.example_records())
        segments = {path.name: path.read_bytes().hex() for path in sorted(journal.glob("*.segment"))}
    records = {str(kind): product.encode_record(record, SALT).hex() for kind, record in RECORD_OF_KIND.items()}
    earlier = read_json("records.json").get("segments_of_format_1", {})  # what an earlier release wrote stays
    write_json("records.json", {"records": records, "segments": segments, "segments_of_format_1": earlier})


def make_dry_run():
    shutil.rmtree(DRY_RUN, ignore_errors=True)
    DRY_RUN.mkdir()
    for config in test_dry_run.CONFIGS:
        for role in test_dry_run.ROLES:
            with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as monkeypatch:
                text = test_dry_run.dry_run(config, role, Path(folder), monkeypatch)
            (DRY_RUN / f"{config}.{role}.txt").write_text(text, encoding="utf-8")


def make_old_run():
    shutil.rmtree(OLD_RUN, ignore_errors=True)
    rng = np.random.default_rng(8)
    entries = make_entries(rng, 4)
    waiting = make_entries(rng, 1, first_ordinal=50)[:2]  # accepted, and in no step yet
    entries = [*entries[:6], *product.other_records(seq=70, ordinal=60), *entries[6:], *waiting]
    product.write_journal(OLD_RUN / "journal", entries, segment_bytes=6000)
    starts = [product.start_run(OLD_RUN) for _ in range(3)][-1]
    trainer = product.small_trainer(seed=5, version=FIRST_VERSION)
    for _, groups in list(product.batches_of(entries))[:2]:
        product.train(trainer, groups)
    path = product.save(OLD_RUN / "checkpoints", trainer, run_epoch=starts, desk_state=b"\x81\xa4next\x0d")
    write_arrays("old_checkpoint.npz", product.trained_weights(trainer) | product.optimizer_values(trainer))
    with tempfile.TemporaryDirectory() as parent:
        recovery = product.recovery_values(copy_of(OLD_RUN, Path(parent)) / "journal", FIRST_VERSION + 2)
    expected = {
        "starts": starts,
        "checkpoint": {
            "folder": path.name,
            "version": FIRST_VERSION + 2,
            "run_epoch": starts,
            "desk_state": b"\x81\xa4next\x0d".hex(),
        },
        "manifest": product.manifest_values(path),
        "recovery": recovery,
        "records": [product.record_values(record) for record in entries],
        "groups": [product.group_values(group) for group in product.groups_of(entries).values()],
    }
    write_json("old_run.json", expected)
    assert read_json("old_run.json") == expected


PARTS = {
    "journal": make_journal,
    "steps": make_steps,
    "frames": make_frames,
    "dry_run": make_dry_run,
    "old_run": make_old_run,
}

if __name__ == "__main__":
    for part in sys.argv[1:] or PARTS:
        PARTS[part]()
