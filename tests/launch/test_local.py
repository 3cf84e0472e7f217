"""The command line of `jaxtrain launch`; what it starts is tested in tests/resilience and tests/process."""

import pytest

from jaxtrain.errors import ConfigError
from jaxtrain.launch.local import Options, main, parse


def test_own_flags_come_before_the_config_and_the_rest_is_the_trainers():
    assert parse(["--processes", "4", "--devices-per-process=2", "c.py", "--steps", "3", "--processes", "9"]) == (
        Options(processes=4, devices_per_process=2),
        ["c.py", "--steps", "3", "--processes", "9"],
    )
    assert parse(["c.py"]) == (Options(), ["c.py"])


@pytest.mark.parametrize(
    "argv, what, fix",
    [
        (["--procesess", "2", "c.py"], "has no flag --procesess", "did you mean '--processes'"),
        (["--processes", "two", "c.py"], "--processes needs a number", ""),
        (["--processes=0", "c.py"], "--processes needs a number", ""),
        (["--processes"], "--processes needs a number", ""),
        (["--fault", "kil:step=3", "c.py"], "no fault 'kil'", "did you mean 'kill'"),
        (["--processes", "2"], "needs a CONFIG", "a file such as configs/quickstart.py"),
    ],
)
def test_a_wrong_command_line_says_what_is_wrong(argv, what, fix):
    with pytest.raises(ConfigError, match=what) as error:
        main(argv)
    assert error.value.fix.startswith(fix)


@pytest.mark.parametrize("argv", [["-h"], ["--help"]])
def test_help_shows_the_flags(argv, capsys):
    assert main(argv) == 0
    assert "--devices-per-process (default: none)" in capsys.readouterr().out
