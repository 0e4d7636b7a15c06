"""Local JSON files are read in both field sets; malformed ones are refused with their row."""

import hashlib
import json

import pytest

from zflora_jax.core.fields import ConfigError
from zflora_jax.data.builders import files, open_prepared
from zflora_jax.data.builders.files import file_config
from zflora_jax.data.builders.formats import LocalJson, read_rows

GSM8K = {
    "question": "How many?",
    "answer": "6*2=<<6*2=12>>12 and 1,000 more: 12+1,000=<<12+1000=1012>>1,012.\n#### 1,012",
}
ADAPTERS = {
    "instruction": "How\nmany?",
    "input": "",
    "output": "\nA: Two and two. The answer is 4. ",
    "answer": "4.0",
}


@pytest.mark.parametrize("as_list", [True, False], ids=["json", "jsonl"])
def test_both_field_sets_are_read(tmp_path, as_list):
    path = tmp_path / "rows"
    rows = [
        GSM8K,
        ADAPTERS,
        ADAPTERS | {"output": ""},
        ADAPTERS | {"input": "a\u2028b", "output": "Apples. A: no."},
    ]
    path.write_text(
        (
            json.dumps(rows, ensure_ascii=False)
            if as_list
            else "\n".join(json.dumps(r, ensure_ascii=False) for r in rows) + "\n\n"
        ),
        "utf-8",
    )
    got = read_rows(path)
    assert got[0] == {
        "instruction": "How many?",
        "input": "",
        "output": "6*2=12 and 1,000 more: 12+1,000=1,012.\nThe answer is 1012.",
        "answer": "1012",
    }
    assert got[1] == {
        "instruction": "How\nmany?",
        "input": "",
        "output": "Two and two. The answer is 4.",
        "answer": "4.0",
    }
    assert got[2]["output"] == "The answer is 4.0."
    assert (got[3]["input"], got[3]["output"]) == ("a\u2028b", "Apples. A: no.")
    source = open_prepared(
        lambda **kw: LocalJson(config=file_config(path), **kw), "rows", tmp_path / "cache"
    )
    assert [{k: v.decode() for k, v in source[i].items()} for i in range(4)] == got


def test_own_rows_need_no_answer_and_keep_their_output(tmp_path):
    """The format that docs/howto.md names. An "A:" is LLM-Adapters' marker only in its rows."""
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"instruction": "Spell it", "output": " A: b\n\tc\n"}))
    row = {"instruction": "Spell it", "input": "", "output": "A: b\n\tc", "answer": ""}
    assert read_rows(path) == [row]


GOOD = json.dumps(ADAPTERS)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (f"{GOOD}\n\n{{broken", r"data, row 3: invalid JSON at column 2"),
        (f"{GOOD}\n[1]", r"data, row 2: expected an object, got list"),
        (f"[{GOOD},", r"data: invalid JSON at column 111"),
        (f"[{GOOD},\n{{broken", r"data: invalid JSON at line 2, column 2"),
        (f"[{GOOD}, 3]", r"data, row 2: expected an object, got int"),
        (
            f'{GOOD}\n{{"answer": {"1" * 5000}}}',
            r"data, row 2: JSON that Python cannot read.*digit",
        ),
        ("[" * 100_000, r"data: JSON that Python cannot read"),
        (
            json.dumps([{"instruction": "x", "answer": "y"}]),
            r"row 1: no field 'output', the row has 'instruction', 'answer'",
        ),
        (
            json.dumps([ADAPTERS | {"answer": 4}]),
            r"row 1: field 'answer' must be a string, got int 4",
        ),
        (
            json.dumps([ADAPTERS | {"input": None}]),
            r"row 1: field 'input' must be a string, got NoneType",
        ),
        (
            json.dumps([ADAPTERS | {"instruction": " "}]),
            r"row 1: the instruction \(or question\) is empty",
        ),
        (
            json.dumps([ADAPTERS | {"output": " ", "answer": ""}]),
            r"row 1: 'output' is empty and there is no 'answer'",
        ),
        (
            json.dumps([{"instruction": "x", "output": " "}]),
            r"row 1: 'output' is empty and there is no 'answer'",
        ),
        (
            json.dumps([GSM8K, {"question": "x", "answer": "12"}]),
            r"row 2: field 'answer' must end with '#### N', got '12'",
        ),
        ("[]", r"data: no rows"),
        (" \n", r"data: no rows"),
        (b"\xff\xfe", r"data: not UTF-8 text"),
    ],
)
def test_malformed_files_are_refused_with_their_row(tmp_path, text, message):
    path = tmp_path / "data"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ConfigError, match=message):
        open_prepared(
            lambda **kw: LocalJson(config=file_config(path), **kw), "rows", tmp_path / "cache"
        )


def test_prepared_rows_follow_the_content_of_the_file(tmp_path, monkeypatch):
    """And the code that reads it: its updates may give other rows of the same file."""

    def read(path):
        source = open_prepared(
            lambda **kw: LocalJson(config=file_config(path), **kw), "rows", tmp_path / "cache"
        )
        return source[0]["answer"], sorted(
            p.name for p in (tmp_path / "cache" / "local_json").iterdir()
        )

    path = tmp_path / "train.json"
    path.write_text(json.dumps([ADAPTERS]))
    before, one = read(path)
    path.write_text(json.dumps([ADAPTERS | {"answer": "5"}]))
    after, two = read(path)
    (tmp_path / "moved.json").write_text(json.dumps([ADAPTERS]))
    moved, still_two = read(tmp_path / "moved.json")
    assert (before, after, moved) == (b"4.0", b"5", b"4.0")
    assert (len(one), len(two), len(still_two)) == (1, 2, 2)
    monkeypatch.setattr(files, "_code", lambda: hashlib.sha256(b"another"))
    assert (read(path)[0], len(read(path)[1])) == (b"5", 3)
