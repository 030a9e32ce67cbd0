"""The shell around the verbs: help, mistakes on the command line, errors, exit codes."""

from __future__ import annotations

import argparse
import errno
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from vlmtune.cli import environment, main
from vlmtune.errors import ConfigError, DataError, Interrupted, TrainingError, VlmtuneError, WeightsError
from vlmtune.version import __version__

Verb = Callable[[argparse.Namespace], int]


@pytest.fixture
def verb(monkeypatch: pytest.MonkeyPatch) -> Callable[[Verb], None]:
    """Make `vlmtune check RUN [key=value …] [-n N]` run a function of the test's."""
    # `prepare` sets variables and filters for the whole process.
    monkeypatch.setattr(environment, "prepare", lambda **_: None)

    def install(run: Verb) -> None:
        def add_arguments(parser: argparse.ArgumentParser) -> None:
            parser.add_argument("config", metavar="RUN.yaml")
            parser.add_argument("overrides", nargs="*", metavar="key=value")
            parser.add_argument("-n", "--number", type=int, default=1)

        fake = SimpleNamespace(HELP="a test", EXAMPLES="vlmtune check x", add_arguments=add_arguments, run=run)
        monkeypatch.setattr(main, "_load", lambda name: fake)

    return install


def raising(error: BaseException) -> Verb:
    def run(args: argparse.Namespace) -> int:
        raise error

    return run


@pytest.mark.parametrize("name", main.VERBS)
def test_every_verb_has_help_with_examples(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main.main([name, "--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert f"usage: vlmtune {name}" in text
    assert "examples:\n  vlmtune " in text
    assert "exit codes: 0 done" in text
    assert "--debug" in text


def test_the_overview_lists_every_verb_and_nothing_else(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["--help"]) == 0
    text = capsys.readouterr().out
    shown = [line[2:14].strip() for line in text.splitlines() if line.startswith("  ")]
    assert shown == [*main.VERBS[:3], "embed fit", "embed gather", *main.VERBS[3:]] and main.VERBS[2] == "embed"
    assert max(map(len, text.splitlines())) <= 120
    assert main.main([]) == 2
    assert capsys.readouterr().out == text


def test_help_is_another_word_for_it(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main.main(["help", "init"])
    assert "usage: vlmtune init" in capsys.readouterr().out


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["--version"]) == 0
    assert capsys.readouterr().out == f"vlmtune {__version__}\n"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["trian"], "error: there is no verb 'trian'. Did you mean train?"),
        (["frobnicate"], "error: there is no verb 'frobnicate'. `vlmtune --help` lists them."),
        (["check"], "error: vlmtune check: the following arguments are required: RUN.yaml. `vlmtune check --help`"),
        (
            ["check", "a.yaml", "--nubmer", "3"],
            "error: vlmtune check: does not know the argument '--nubmer'. Did you mean --number?",
        ),
        (
            ["check", "a.yaml", "--num_train_epochs", "3"],
            "error: vlmtune check: does not know the argument '--num_train_epochs'. "
            "Options of the configuration are written train.epochs=VALUE, without dashes.",
        ),
        (
            ["check", "a.yaml", "--learning-rate=3"],
            "error: vlmtune check: does not know the argument '--learning-rate=3'. "
            "Options of the configuration are written train.learning_rate=VALUE, without dashes.",
        ),
        (["check", "a.yaml", "-n", "x"], "error: vlmtune check: argument -n/--number: invalid int value: 'x'"),
    ],
)
def test_mistakes_on_the_command_line(
    argv: list[str], message: str, verb: Callable[[Verb], None], capsys: pytest.CaptureFixture[str]
) -> None:
    verb(lambda args: 0)
    assert main.main(argv) == 2
    error = capsys.readouterr().err
    assert error.startswith(message)
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    "argv",
    [
        ["check", "r.yaml", "a.b=1", "c.d=2", "-n", "3"],
        ["check", "r.yaml", "a.b=1", "-n", "3", "c.d=2"],
        ["check", "-n", "3", "r.yaml", "a.b=1", "c.d=2"],
        ["--debug", "check", "r.yaml", "a.b=1", "c.d=2", "-n", "3"],
        ["check", "--offline", "r.yaml", "a.b=1", "c.d=2", "-n3"],
    ],
)
def test_overrides_and_options_mix(argv: list[str], verb: Callable[[Verb], None]) -> None:
    seen: list[argparse.Namespace] = []
    verb(lambda args: seen.append(args) or 0)
    assert main.main(argv) == 0
    assert (seen[0].config, seen[0].overrides, seen[0].number) == ("r.yaml", ["a.b=1", "c.d=2"], 3)
    assert seen[0].debug == ("--debug" in argv)
    assert seen[0].offline == ("--offline" in argv)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (VlmtuneError("x"), 1),
        (TrainingError("x"), 1),
        (ConfigError("x"), 2),
        (DataError("x"), 3),
        (WeightsError("x"), 4),
        (Interrupted("x"), 130),
        (Interrupted("x", signal_number=15), 143),
        (KeyboardInterrupt(), 130),
        (RuntimeError("x"), 1),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else str(value),
)
def test_exit_codes(
    error: BaseException, code: int, verb: Callable[[Verb], None], capsys: pytest.CaptureFixture[str]
) -> None:
    verb(raising(error))
    assert main.main(["check", "r.yaml"]) == code
    assert "Traceback" not in capsys.readouterr().err


def test_a_stop_is_no_error(
    verb: Callable[[Verb], None], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    verb(raising(Interrupted("stopped at step 3", signal_number=15, where="runs/a", remedy="Start it again.")))
    assert main.main(["check", "r.yaml"]) == 143
    assert capsys.readouterr().err == "runs/a: stopped at step 3. Start it again.\n"
    monkeypatch.setenv("RANK", "1")  # the first process has said it
    assert main.main(["check", "r.yaml"]) == 143
    assert capsys.readouterr().err == ""


def test_an_error_is_one_paragraph(verb: Callable[[Verb], None], capsys: pytest.CaptureFixture[str]) -> None:
    verb(raising(DataError("2 <image> marks but 1 image", where="coco.jsonl:124", remedy="Remove a mark.")))
    main.main(["check", "r.yaml"])
    captured = capsys.readouterr()
    assert captured.err == "error: coco.jsonl:124: 2 <image> marks but 1 image. Remove a mark.\n"
    assert captured.out == ""


def test_debug_shows_the_traceback_before_the_paragraph(
    verb: Callable[[Verb], None], capsys: pytest.CaptureFixture[str]
) -> None:
    verb(raising(DataError("bad row")))
    assert main.main(["check", "r.yaml", "--debug"]) == 3
    error = capsys.readouterr().err
    assert error.startswith("Traceback") and error.endswith("error: bad row.\n")


def test_the_unforeseen_keeps_its_traceback_in_a_file(
    verb: Callable[[Verb], None], capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    verb(raising(RuntimeError("shape '[2]' is invalid\nsecond line")))
    assert main.main(["check", "r.yaml"]) == 1
    (kept,) = tmp_path.iterdir()
    text = capsys.readouterr().err
    assert text.startswith("error: RuntimeError: shape '[2]' is invalid\n") and str(kept) in text
    assert "Traceback" in kept.read_text() and "second line" in kept.read_text()


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (MemoryError(), "Lower train.micro_batch_size"),
        (OSError(errno.ENOSPC, "No space left on device", "x/y"), "x/y: cannot be written (No space left on device)"),
        (PermissionError(errno.EACCES, "Permission denied", "x/y"), "x/y: permission denied."),
    ],
)
def test_trouble_with_the_machine_is_said_in_words(
    error: Exception, words: str, verb: Callable[[Verb], None], capsys: pytest.CaptureFixture[str]
) -> None:
    verb(raising(error))
    assert main.main(["check", "r.yaml"]) == 1
    assert words in capsys.readouterr().err


def test_a_rank_says_which_it_is(
    verb: Callable[[Verb], None], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "3")
    verb(raising(DataError("bad row")))
    main.main(["check", "r.yaml"])
    assert capsys.readouterr().err == "[rank 3] error: bad row.\n"


# --- in a process of its own ----------------------------------------------------------------------------------------


def python(code: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environ = {name: value for name, value in os.environ.items() if not name.startswith("HF_")} | variables
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False, env=environ
    )


@pytest.mark.parametrize("argv", [["--help"], ["train", "--help"], ["check", "--help"], ["init"], ["--version"]])
def test_help_is_quick_and_imports_no_torch(argv: list[str]) -> None:
    code = (
        "import sys, time; start = time.perf_counter()\n"
        "from vlmtune.cli.main import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit: pass\n"
        "assert not {'torch', 'transformers', 'numpy', 'PIL'} & set(sys.modules), 'heavy'\n"
        "print('seconds', time.perf_counter() - start, file=sys.stderr)"
    )
    best = 9.0
    for _ in range(3):  # the machine may be busy
        done = python(code, *argv)
        assert done.returncode == 0, done.stderr
        best = min(best, float(done.stderr.split()[-1]))
    assert best < 0.5


@pytest.mark.parametrize("say", ["print", "Screen().print", "Screen(stderr=True).print"])
def test_a_reader_that_goes_away_is_no_error(say: str) -> None:
    code = (
        "import os, sys; from vlmtune.cli import init; from vlmtune.cli.main import entry\n"
        "from vlmtune.progress import Screen\n"
        "def run(args):\n"
        f"    for _ in range(20_000): {say}('line')\n"
        "    return 0\n"
        "init.run = run; sys.argv = ['vlmtune', 'init']\n" + ("os.dup2(1, 2)\n" if "stderr" in say else "") + "entry()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == ""
        assert process.wait() == 141


def test_a_broken_pipe_of_the_programs_own_is_an_error() -> None:
    code = (
        "import sys; from vlmtune.cli import init; from vlmtune.cli.main import entry\n"
        "def run(args): raise BrokenPipeError(32, 'Broken pipe')\n"
        "init.run = run; sys.argv = ['vlmtune', 'init']; entry()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("error: BrokenPipeError")


def test_interrupt_ends_with_130() -> None:
    code = (
        "import signal, sys, time; from vlmtune.cli import init; from vlmtune.cli.main import entry\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a shell's background jobs ignore it
        "def run(args):\n"
        "    print('ready', flush=True); time.sleep(60)\n"
        "init.run = run; sys.argv = ['vlmtune', 'init']; entry()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.readline()
        time.sleep(0.05)
        process.send_signal(2)
        assert process.wait(timeout=20) == 130
        assert process.stderr.read() == "Stopped.\n"


SHOW = (
    "import os, sys; from vlmtune.cli import environment\n"
    "environment.prepare(offline='--offline' in sys.argv, debug='--debug' in sys.argv)\n"
    "environment.allow_network(*[name for name in sys.argv[1:] if name[:2] != '--'])\n"
    "print(*(os.environ.get(n) for n in ('HF_HUB_OFFLINE', 'HF_HUB_DISABLE_TELEMETRY', 'TOKENIZERS_PARALLELISM')))"
)


@pytest.mark.parametrize(
    ("arguments", "variables", "shown"),
    [
        (["/models/a"], {}, "1 1 false"),
        (["models"], {}, "1 1 false"),
        (["org/name"], {}, "None 1 false"),
        (["/models/a", "org/dataset"], {}, "None 1 false"),
        (["org/name", "--offline"], {}, "1 1 false"),
        (["org/name"], {"HF_HUB_OFFLINE": "1"}, "1 1 false"),
        (["/models/a"], {"HF_HUB_OFFLINE": "0"}, "0 1 false"),
        (["/models/a"], {"TOKENIZERS_PARALLELISM": "true"}, "1 1 true"),
    ],
)
def test_the_network_is_closed_unless_a_hub_id_is_given(
    arguments: list[str], variables: dict[str, str], shown: str
) -> None:
    environ = {"TOKENIZERS_PARALLELISM": "false", **variables}
    assert python(SHOW, *arguments, **environ).stdout.strip() == shown
