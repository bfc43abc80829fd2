"""Completion of the command in shells."""

import shutil
import subprocess

import pytest

from krrst_fast.cli.main import main

pytest.importorskip("docstring_parser")


def _script(shell: str, capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    assert main(["completion", shell]) == 0
    return capsys.readouterr().out


def _complete(script: str, *words: str) -> list[str]:
    """What bash offers for the last of the words."""
    line = " ".join(f"'{word}'" for word in words)
    program = f"{script}\nCOMP_WORDS=({line}); COMP_CWORD={len(words) - 1}; _krrst; "
    done = subprocess.run(
        ["bash", "--norc", "-c", program + 'printf "%s\\n" "${COMPREPLY[@]}"'],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.split()


@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash")
def test_bash_completes_commands_flags_and_words(capsys: pytest.CaptureFixture[str]) -> None:
    script = _script("bash", capsys)
    assert _complete(script, "krrst", "di") == ["distill"]
    assert {"prepare", "info", "export", "import"} <= set(_complete(script, "krrst", ""))
    assert _complete(script, "krrst", "distill", "--pool.on") == ["--pool.online_steps"]
    assert _complete(script, "krrst", "export", "r", "--to", "d") == [
        "ddranking",
        "dcbench",
        "datm",
    ]
    assert _complete(script, "krrst", "distill", "--init_images", "n") == ["noise"]
    assert _complete(script, "krrst", "distill", "some") == []  # files


def test_every_shell_knows_every_command_and_flag(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["target", "--help"])
    flags = {w.strip("[],") for w in capsys.readouterr().out.split() if w.startswith("--num_")}
    for shell, form in (("bash", "{}"), ("zsh", "{}"), ("fish", "-l {}")):
        script = _script(shell, capsys)
        assert flags and all(form.format(f if "-l" not in form else f[2:]) in script for f in flags)
        assert "import" in script and "evaluate" in script


def test_an_unknown_shell_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", "csh"]) == 2
    assert "csh" in capsys.readouterr().err
