"""Text read one way: byte order marks, line ends, and characters that only look like line ends."""

from __future__ import annotations

import json

import pytest

from zflora_jax.core.fields import ConfigError
from zflora_jax.core.textfile import decode, lines_of
from zflora_jax.reporting.metrics import read_metrics

NO_ENDS = "a\u2028b\u2029c\x0bd\x0ce\x1cf\x85g"  # str.splitlines cuts at each of them


def test_lines_end_at_line_ends_alone():
    assert lines_of(f"one\r\ntwo\rthree\n\n{NO_ENDS}\n") == ["one", "two", "three", "", NO_ENDS]
    assert lines_of("") == [] and lines_of("\n") == [""] and lines_of("last") == ["last"]


def test_a_byte_order_mark_is_no_text_and_other_encodings_are_refused():
    assert decode("\ufeffone\n".encode(), "f") == "one\n"
    with pytest.raises(ConfigError, match=r"words.txt: not UTF-8 text \(.* at byte 1\)\. Save it"):
        decode("a\xe9".encode("latin-1"), "words.txt")


def test_metrics_with_such_characters_are_one_record(tmp_path):
    record = {"step": 1, "split": "train", "note": NO_ENDS}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(record, ensure_ascii=False) + "\n", "utf-8")
    assert read_metrics(tmp_path / "metrics.jsonl") == [record]
