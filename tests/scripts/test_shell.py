"""The shell scripts: their syntax, their help, and when the environment is installed again."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted([*ROOT.glob("scripts/*.sh"), ROOT / ".ci" / "run"])

pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash on this machine")


def run(*command: str | Path, **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(part) for part in command],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        **options,
    )


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_bash_can_read_it(script: Path) -> None:
    done = run("bash", "-n", script)
    assert (done.returncode, done.stderr) == (0, "")
    assert os.access(script, os.X_OK)
    assert "set -euo pipefail" in script.read_text()


@pytest.mark.parametrize(("name", "word"), [("quickstart.sh", "--data DIR"), ("test.sh", "-m slow")])
def test_help(name: str, word: str, tmp_path: Path) -> None:
    done = run(ROOT / "scripts" / name, "--help", cwd=tmp_path)
    assert done.returncode == 0
    assert word in done.stdout
    assert done.stderr == ""


@pytest.mark.parametrize("arguments", [["--dta", "x"], ["--data"]])
def test_quickstart_names_a_bad_option(arguments: list[str]) -> None:
    done = run(ROOT / "scripts" / "quickstart.sh", *arguments)
    assert done.returncode == 2
    assert arguments[0] in done.stderr


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout whose .venv holds a Python that writes down what pip is asked for instead of doing it."""
    folder = tmp_path / "a folder"
    (folder / "scripts").mkdir(parents=True)
    shutil.copy(ROOT / "scripts" / "_environment.sh", folder / "scripts")
    (folder / "pyproject.toml").write_text("[project]\n")
    python = folder / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(
        f"""#!/bin/sh
if [ "$1 $2" = "-m pip" ]; then
    if [ "$3" = show ]; then exit 0; fi
    if [ "$3" != --version ]; then echo "$@" >> "{tmp_path}/asked"; fi
    if [ -f "{tmp_path}/broken" ]; then echo "ERROR: no such release"; exit 1; fi
    exit 0
fi
exec "{sys.executable}" "$@"
"""
    )
    python.chmod(0o755)
    return folder


def asked(checkout: Path, *extras: str, spec: str = "torch==9.9 --index-url https://example.org/whl") -> list[str]:
    """The calls of pip that a run of the script makes."""
    log = checkout.parent / "asked"
    log.unlink(missing_ok=True)
    done = run(checkout / "scripts" / "_environment.sh", *extras, env={**os.environ, "TORCH_SPEC": spec})
    assert done.returncode == 0, done.stderr
    return log.read_text().splitlines() if log.exists() else []


def test_the_environment_is_installed_once(checkout: Path) -> None:
    torch, package = asked(checkout, "test")
    assert torch.endswith(" torch==9.9 --index-url https://example.org/whl")
    assert package.endswith(" -e .[test]")
    assert asked(checkout, "test") == []
    assert asked(checkout) == []  # what is asked for is there, and more


def test_a_further_extra_keeps_those_before(checkout: Path) -> None:
    asked(checkout, "test")
    assert asked(checkout, "lint")[-1].endswith(" -e .[test,lint]")
    assert asked(checkout, "test", "lint") == []


def test_a_change_of_pyproject_or_torch_installs_again(checkout: Path) -> None:
    asked(checkout, "test")
    (checkout / "pyproject.toml").write_text("[project]\nname = 'x'\n")
    assert len(asked(checkout, "test")) == 2
    calls = asked(checkout, "test", spec="torch==9.8")
    assert "uninstall -y torch" in calls[0]  # else the build that is there would satisfy the new spec
    assert calls[1].endswith(" torch==9.8")


def test_what_pip_says_is_shown_when_it_fails(checkout: Path) -> None:
    (checkout.parent / "broken").touch()
    (checkout / ".venv" / "bin" / "python").write_text(
        (checkout / ".venv" / "bin" / "python").read_text().replace("if [ -f", 'if [ "$3" = install ] && [ -f')
    )
    done = run(checkout / "scripts" / "_environment.sh", env={**os.environ, "TORCH_SPEC": "torch==9.9"})
    assert done.returncode == 1
    assert "ERROR: no such release" in done.stderr
    assert not (checkout / ".venv" / "installed.txt").exists()
