"""A store on loopback: moto's S3 server in a process of its own, and buckets in it."""

from __future__ import annotations

import re
import secrets
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

START_WITHIN = 60.0  # seconds


@contextmanager
def moto_server() -> Iterator[str]:
    """The address of an S3 server with nothing in it; it ends with the context. The test is skipped
    where moto or s3fs is missing.
    """
    pytest.importorskip("moto", reason="moto[s3,server] is not installed")
    pytest.importorskip("s3fs", reason="s3fs is not installed")
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            [sys.executable, "-u", "-m", "moto.server", "-H", "127.0.0.1", "-p", "0"],
            stdout=log,
            stderr=log,
        )
        try:
            yield _address(process, log)
        finally:
            process.kill()
            process.wait(timeout=30)


def _address(process: subprocess.Popen[bytes], log: object) -> str:
    """Which free port it took, as it says."""
    deadline, said = time.monotonic() + START_WITHIN, ""
    while process.poll() is None and time.monotonic() < deadline:
        log.seek(0)  # type: ignore[attr-defined]
        said = log.read().decode()  # type: ignore[attr-defined]
        if found := re.search(r"Running on (http://127\.0\.0\.1:\d+)", said):
            return found[1]
        time.sleep(0.05)
    raise AssertionError(f"moto did not start: {said[-1000:]}")


def use_store(patch: pytest.MonkeyPatch, address: str) -> None:
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
    for name, value in settings.items():
        patch.setenv(name, value)


def new_bucket() -> str:
    """The name of a new, empty bucket in the store."""
    import fsspec

    name = f"bucket-{secrets.token_hex(4)}"
    fsspec.filesystem("s3", skip_instance_cache=True).mkdir(name)
    return name


def names(bucket: str) -> list[str]:
    """The objects of a bucket, in order."""
    import fsspec

    found = fsspec.filesystem("s3").find(bucket)
    return sorted(name.removeprefix(f"{bucket}/") for name in found)
