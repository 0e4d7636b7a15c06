"""Runs the emulator of Google Cloud Storage with an exact reader of uploads. gcsfs ends a part by a
line feed alone; the emulator's parser takes a carriage return that content ends with for a part of
that line's end, and drops it.
"""

import sys
from email.message import Message
from email.parser import BytesParser

from gcp_storage_emulator import __main__ as emulator, server


class ExactParser(BytesParser):
    def parsebytes(self, text: bytes, headersonly: bool = False) -> Message:
        message = super().parsebytes(text, headersonly)
        if message.get_content_subtype() == "related":  # an upload: metadata and content
            part = text.split(b"\n--" + message.get_boundary().encode())[2]
            message.get_payload(1).set_payload(part.partition(b"\n\n")[2])
        return message


if __name__ == "__main__":
    server.BytesParser = ExactParser
    sys.exit(emulator.main())
