"""The job's secret: where it comes from, who makes it, and whom it is kept from."""

import os
from concurrent.futures import ThreadPoolExecutor

import pytest

from jaxtrain.errors import RunError
from jaxtrain.resilience.secret import FILE, VARIABLE, job_secret


def test_all_that_come_at_the_same_time_have_one_secret(tmp_path):
    with ThreadPoolExecutor(16) as pool:
        found = set(pool.map(lambda _: job_secret({}, tmp_path / "run"), range(64)))
    assert len(found) == 1 and len(found.pop()) == 64
    assert [path.name for path in (tmp_path / "run").iterdir()] == [FILE]


def test_its_file_is_for_its_owner_alone_whatever_the_umask(tmp_path):
    old = os.umask(0)
    try:
        job_secret({}, tmp_path)
    finally:
        os.umask(old)
    assert (tmp_path / FILE).stat().st_mode & 0o777 == 0o600


def test_two_jobs_have_different_secrets(tmp_path):
    assert job_secret({}, tmp_path / "a") != job_secret({}, tmp_path / "b")


def test_the_environment_comes_first_and_leaves_no_file(tmp_path):
    assert job_secret({VARIABLE: "sixteen bytes or more\n"}, tmp_path) == b"sixteen bytes or more"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("text", ["", "   ", "short"])
def test_one_that_can_be_guessed_is_refused(tmp_path, text):
    with pytest.raises(RunError, match="too short"):
        job_secret({VARIABLE: text}, tmp_path)
    (tmp_path / FILE).touch(mode=0o600)
    with pytest.raises(RunError, match="too short"):
        job_secret({}, tmp_path)


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660])
def test_a_file_that_others_can_read_is_refused(tmp_path, mode):
    job_secret({}, tmp_path)
    (tmp_path / FILE).chmod(mode)
    with pytest.raises(RunError, match="(?s)Others know.*-rw.*remove it"):
        job_secret({}, tmp_path)


@pytest.mark.skipif(os.geteuid() != 0, reason="gives a file to another user, as root can")
def test_a_file_of_another_user_is_refused(tmp_path):
    job_secret({}, tmp_path)
    os.chown(tmp_path / FILE, 12345, -1)
    with pytest.raises(RunError, match="owned by user 12345"):
        job_secret({}, tmp_path)


def test_a_link_a_folder_or_a_pipe_in_its_place_is_refused(tmp_path):
    job_secret({}, tmp_path / "other")
    path = tmp_path / FILE
    path.symlink_to(tmp_path / "other" / FILE)
    with pytest.raises(RunError, match="cannot be kept"):
        job_secret({}, tmp_path)
    path.unlink()
    os.mkfifo(path, 0o600)
    with pytest.raises(RunError, match="plain file"):
        job_secret({}, tmp_path)
    path.unlink()
    path.mkdir(0o700)
    with pytest.raises(RunError, match="cannot be kept|plain file"):
        job_secret({}, tmp_path)


def test_a_folder_that_cannot_be_written_says_what_to_do(tmp_path):
    (tmp_path / "run").touch()
    with pytest.raises(RunError, match=f"(?s)cannot be kept.*set {VARIABLE}"):
        job_secret({}, tmp_path / "run")
