"""`--help` says what each argument is and how calls look, and shells complete them."""

from __future__ import annotations

import argparse
import shlex
import shutil
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
from commands import commands

from flax_partial.cli.main import WRONG_USE, main, new_parser

if TYPE_CHECKING:
    from pathlib import Path

    from shell import Shell

COMMANDS = {command.prog.split()[-1]: command for command in commands()}


@pytest.mark.parametrize("name", COMMANDS)
def test_help_has_a_line_for_each_argument_and_examples_that_are_calls(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for action in COMMANDS[name]._actions:  # noqa: SLF001
        assert action.help, action
    with pytest.raises(SystemExit):
        main([name, "--help"])
    shown = capsys.readouterr().out.partition("\nexamples:\n")[2].splitlines()
    assert shown
    for line in shown:
        program, *arguments = shlex.split(line.partition(" > ")[0])
        assert (program, arguments[0]) == ("flax-partial", name)
        assert isinstance(new_parser().parse_args(arguments), argparse.Namespace)


@pytest.mark.parametrize(
    ("line", "program", "said"),
    [
        ("ls run --jsn", "flax-partial ls", "there is no option --jsn; there is --json"),
        ("--jsn ls run", "flax-partial ls", "there is no option --jsn; there is --json"),
        ("show run --deth=2", "flax-partial show", "there is no option --deth; there is --depth"),
        ("ls run --quietly", "flax-partial ls", "there is no option --quietly\n"),
        ("ls run another", "flax-partial ls", "another is one argument too many"),
        ("--jsn", "flax-partial", "there is no option --jsn; there is --json"),
    ],
)
def test_what_a_command_does_not_have_is_named_with_what_is_most_like_it(
    line: str, program: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(line.split())
    assert ended.value.code == WRONG_USE
    assert f"{program}: error: {said}" in capsys.readouterr().err


COMPLETE = """
source "$1"; shift
read -ra spec <<< "$(complete -p flax-partial)"
COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); COMP_LINE="$*"; COMP_POINT=${#COMP_LINE}
word=${COMP_WORDS[COMP_CWORD]} before=${COMP_WORDS[COMP_CWORD - 1]}
for ((i = 0; i < ${#spec[@]}; i++)); do
  [ "${spec[i]}" = -F ] && "${spec[i + 1]}" flax-partial "$word" "$before"
done
printf '%s\\n' "${COMPREPLY[@]}"
"""


@pytest.mark.parametrize(
    ("words", "found"),
    [
        ("ver", {"verify"}),
        ("status --wa", {"--watch"}),
        ("ls --mode m", {"min", "max"}),
        ("show ru", {"runs"}),
        ("export runs rub", {"ruble.st"}),
        ("completion f", {"fish"}),
    ],
)
def test_bash_completes_commands_options_and_paths(
    words: str, found: set[str], tmp_path: Path, shell: Shell
) -> None:
    pytest.importorskip("shtab", reason="pip install '.[completion]'")
    (tmp_path / "runs").mkdir()
    (tmp_path / "ruble.st").touch()
    (tmp_path / "script").write_text(shell.run("completion", "bash"))
    done = subprocess.run(
        ["bash", "-c", COMPLETE, "bash", "./script", "flax-partial", *words.split()],
        cwd=tmp_path,
        check=True,
        capture_output=True,
        text=True,
    )
    assert {one.strip().rstrip("/") for one in done.stdout.splitlines()} == found


@pytest.mark.parametrize("name", ["bash", "zsh", "fish"])
def test_script_of_each_shell_is_one_and_has_every_command(
    name: str, tmp_path: Path, shell: Shell
) -> None:
    pytest.importorskip("shtab", reason="pip install '.[completion]'")
    script = shell.run("completion", name)
    assert all(command in script for command in COMMANDS)
    assert shell.json("completion", name)["script"] + "\n" == script
    if shutil.which(name):
        (tmp_path / "script").write_text(script)
        subprocess.run([name, "-n", tmp_path / "script"], check=True)


def test_without_shtab_it_says_what_to_install(
    shell: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "shtab", None)
    shell.run("completion", "bash", status=WRONG_USE)
    assert "[completion]'" in shell.error
