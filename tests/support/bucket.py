"""Stores on loopback, in processes of their own: moto's S3 server and an emulator of Google Cloud
Storage; and buckets in them.
"""

from __future__ import annotations

import contextlib
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

START_WITHIN = 60.0  # seconds
SERVERS = {
    "s3": "moto.server -H 127.0.0.1 -p {}",
    "gs": "support.gcs_emulator start --in-memory --host=127.0.0.1 --port={}",
}


@contextmanager
def server(scheme: str) -> Iterator[str]:
    """The address of a store with nothing in it; it ends with the context."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", *SERVERS[scheme].format(port).split()]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(command, cwd=Path(__file__).parents[1], **quiet)
    try:
        deadline = time.monotonic() + START_WITHIN
        while process.poll() is None and time.monotonic() < deadline:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
                break
            time.sleep(0.05)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait(timeout=30)


def use_store(patch: pytest.MonkeyPatch, scheme: str, address: str) -> None:
    """Let this process, and those that it starts, speak to the store at `address` alone."""
    settings = {
        "AWS_ENDPOINT_URL": address,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_CONFIG_FILE": "/dev/null",
        "AWS_SHARED_CREDENTIALS_FILE": "/dev/null",
    }
    if scheme == "gs":
        settings = {
            "STORAGE_EMULATOR_HOST": address,
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # it asks Google for credentials
        }
    for name, value in settings.items():
        patch.setenv(name, value)


def new_bucket(scheme: str) -> str:
    """The URL of a new, empty bucket in the store."""
    import fsspec

    name = f"bucket-{secrets.token_hex(4)}"
    fsspec.filesystem(scheme, skip_instance_cache=True).mkdir(name)
    return f"{scheme}://{name}"


def names(url: str) -> list[str]:
    """The objects of the bucket of a URL, in order."""
    import fsspec

    scheme, _, rest = url.partition("://")
    bucket = rest.partition("/")[0]
    found = fsspec.filesystem(scheme).find(bucket)
    return sorted(name.removeprefix(f"{bucket}/") for name in found)
