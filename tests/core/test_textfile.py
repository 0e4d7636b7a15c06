"""Text read one way: byte order marks, line ends, and characters that only look like line ends."""

import pytest

from zflora_jax.core.fields import ConfigError
from zflora_jax.core.textfile import decode, lines_of

NO_ENDS = "a\u2028b\u2029c\x0bd\x0ce\x1cf\x85g"  # str.splitlines cuts at each of them


def test_text_and_its_lines():
    assert lines_of(f"one\r\ntwo\rthree\n\n{NO_ENDS}\n") == ["one", "two", "three", "", NO_ENDS]
    assert lines_of("") == [] and lines_of("\n") == [""] and lines_of("last") == ["last"]
    assert decode("\ufeffone\n".encode(), "f") == "one\n"
    with pytest.raises(ConfigError, match=r"words.txt: not UTF-8 text \(.* at byte 1\)\. Save it"):
        decode("a\xe9".encode("latin-1"), "words.txt")
