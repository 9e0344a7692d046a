"""The exact bytes of one frame of each message, of one record of each kind, and of a journal segment.

What two releases send each other and find on each other's disks. Data: make_data.py.
"""

import os

import pytest

from tests.golden import product
from tests.golden.stored import read_json

SALT = 0x01020304
FRAMES = read_json("frames.json")
RECORDS = read_json("records.json")
MESSAGES = {product.message_code(message): message for message in product.example_messages()}
RECORD_OF_KIND = {product.record_kind(record): record for record in product.example_records()}


def known_salt(monkeypatch):
    """Journals begin with random bytes; these are known."""
    monkeypatch.setattr(os, "urandom", lambda count: SALT.to_bytes(count, "little"))


def test_every_message_and_every_kind_of_record_is_stored():
    assert {int(code) for code in FRAMES} == MESSAGES.keys() == product.message_codes()
    assert {int(kind) for kind in RECORDS["records"]} == RECORD_OF_KIND.keys() == product.record_kinds()


@pytest.mark.parametrize("code", sorted(MESSAGES))
def test_every_field_of_the_examples_is_filled(code):
    assert product.fields_left_at_default(MESSAGES[code]) == []


@pytest.mark.parametrize("code", sorted(FRAMES, key=int))
def test_a_message_has_the_stored_bytes_and_comes_back_from_them(code):
    message, frame = MESSAGES[int(code)], bytes.fromhex(FRAMES[code])
    assert product.encode_message(message).hex() == frame.hex()
    assert product.decode_message(frame) == message


@pytest.mark.parametrize("kind", sorted(RECORDS["records"], key=int))
def test_a_record_has_the_stored_bytes_and_comes_back_from_them(kind):
    record, data = RECORD_OF_KIND[int(kind)], bytes.fromhex(RECORDS["records"][kind])
    assert product.encode_record(record, SALT).hex() == data.hex()
    assert product.decode_record(data, SALT) == record


def test_a_segment_has_the_stored_bytes_and_comes_back_from_them(tmp_path, monkeypatch):
    known_salt(monkeypatch)
    product.write_journal(tmp_path / "new", product.example_records())
    assert {path.name: path.read_bytes().hex() for path in (tmp_path / "new").glob("*.segment")} == RECORDS["segments"]
    (tmp_path / "old").mkdir()
    for name, data in RECORDS["segments"].items():
        (tmp_path / "old" / name).write_bytes(bytes.fromhex(data))
    assert product.read_journal(tmp_path / "old") == product.example_records()


def test_a_segment_of_the_first_format_comes_back(tmp_path):
    for name, data in RECORDS["segments_of_format_1"].items():
        (tmp_path / name).write_bytes(bytes.fromhex(data))
    assert product.read_journal(tmp_path) == product.example_records()[:-3]  # the last three kinds came later
