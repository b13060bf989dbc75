"""The command line as a program: exit status, one sentence, no half of anything."""
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from vla_nb.apps import cli
from vla_nb.core.types import UserError

BIN = Path(sys.executable).parent


def call(*argv, **kw): return subprocess.run([BIN / "vla-nb", *argv], capture_output=True, text=True, timeout=120, **kw)


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_every_command_exists(command):
    "The import string of each command leads to a function."
    assert callable(cli.load(cli.COMMANDS[command].run))


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_every_command_explains_itself(command, capsys):
    "`--help` anywhere after the command: usage, purpose and every flag with its meaning; nothing runs."
    known = cli.COMMANDS[command]
    assert cli.main([*command.split(), "--nonsense", "--help"]) == 0
    out, err = capsys.readouterr()
    assert out.startswith(f"usage: vla-nb {command}") and known.about in out and not err
    if known.options:
        names = {line.split("=")[0].strip().split(".")[0] for line in out.splitlines() if line.startswith("  --")}
        assert names == {f"--{name}" for flags in known.options.split() for name in cli.load(flags).__dataclass_fields__}
        assert not [line for line in out.splitlines() if line.startswith("  --") and len(line.split(" ", 3)) < 4]


def test_help_lists_every_command():
    run = call("--help")
    assert run.returncode == 0 and all(f"  {c} " in run.stdout for c in cli.COMMANDS)
    assert call().stdout == run.stdout


@pytest.mark.parametrize("argv,says", [
    (["trian"], "did you mean 'train'?"), (["data"], "one of pull, verify, convert, edit"), (["eval", "mqc"], "one of mcq, offline"),
    (["info", "--all"], "has no options"),
])
def test_wrong_command(argv, says):
    "One sentence on standard error, nothing on standard output, exit status 2."
    run = call(*argv)
    assert run.returncode == 2 and run.stdout == "" and says in run.stderr and len(run.stderr.splitlines()) == 1


def test_debug_adds_the_traceback():
    run = call("--debug", "info", "--all")
    assert run.returncode != 0 and "Traceback" in run.stderr and "UserError" in run.stderr


@pytest.mark.parametrize("error,status,says", [
    (UserError("No run at x."), 2, "vla-nb boom: No run at x."),
    (KeyboardInterrupt(), 130, "interrupted"),
    (OSError(28, "No space left on device", "x.bin"), 1, "No space left on device (x.bin)"),
    (RuntimeError("first\nsecond"), 1, "RuntimeError: first second (add --debug"),
])
def test_errors_become_sentences(monkeypatch, capsys, error, status, says):
    "Every kind of error ends in one line and its own exit status."
    def boom(argv): raise error
    monkeypatch.setattr("vla_nb.apps.doctor.info", boom)
    assert cli.run_command({"boom": cli.Command("apps.doctor:info", "")}, ["boom"]) == status
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and says in lines[0]


def test_ctrl_c_from_the_terminal():
    "SIGINT during a command ends with status 130 and no traceback."
    code = ("import sys, time, vla_nb.apps.doctor as d\nfrom vla_nb.apps import cli\n"
            "def info(argv): print('in', flush=True); time.sleep(60)\nd.info = info\nsys.exit(cli.main(['info']))")
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                             preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))   # tests in the background ignore it
    assert child.stdout.readline().strip() == "in"
    time.sleep(0.1)
    child.send_signal(signal.SIGINT)
    err = child.communicate(timeout=30)[1]
    assert child.returncode == 130 and err == "vla-nb info: interrupted\n"


@pytest.mark.parametrize("argv", [["--help"], ["info"]])
def test_reader_of_a_pipe_may_leave(argv):
    "When nobody reads standard output any more, the program ends without a complaint, as `cat` does."
    read, write = os.pipe()
    os.close(read)
    run = subprocess.run([BIN / "vla-nb", *argv], stdout=write, stderr=subprocess.PIPE, text=True, timeout=60)
    os.close(write)
    assert run.returncode == 141 and run.stderr == ""


def test_a_broken_pipe_inside_a_command_is_an_error(monkeypatch, capsys):
    "A worker that died is not mistaken for a reader that left."
    def boom(argv): raise BrokenPipeError(32, "Broken pipe")
    monkeypatch.setattr("vla_nb.apps.doctor.info", boom)
    assert cli.run_command({"boom": cli.Command("apps.doctor:info", "")}, ["boom"]) == 1
    assert "Broken pipe" in capsys.readouterr().err


def test_info_and_doctor():
    "Both run anywhere; doctor's exit status follows its findings."
    info, doctor = call("info"), call("doctor")
    assert info.returncode == 0 and all(w in info.stdout for w in ("torch", "python", "revision", "settings"))
    assert doctor.returncode == (1 if "\nfail" in "\n" + doctor.stdout else 0) and "off-screen drawing" in doctor.stdout
