"""A small file system of a test's own."""

import os
import shutil
import subprocess

import pytest


@pytest.fixture
def disk(tmp_path):
    """A file system of 4 MB, that can be filled and made read-only."""
    place = tmp_path / "disk"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "none", str(place)], capture_output=True).returncode:
        pytest.skip("mounting needs root")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def remount(disk, mode):
    subprocess.run(["mount", "-o", f"remount,{mode}", str(disk)], check=True)


def fill(disk):
    """To the last byte, by a file that may be removed again."""
    (disk / "other").write_bytes(b"x" * shutil.disk_usage(disk).free)
    assert os.statvfs(disk).f_bavail == 0
    return disk / "other"
