"""The command line: fast and quiet starts, files of settings, errors of one line."""

import json
import logging
import resource
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from purified_opsd_trl import InputError, cli
from purified_opsd_trl.errors import DEBUG_VARIABLE, LAUNCHED_VARIABLE, exit_status
from purified_opsd_trl.extras import quiet_start
from purified_opsd_trl.train import RENAMED, make_parser


HEAVY = ("torch", "transformers", "trl", "accelerate", "datasets", "peft", "numpy")


@pytest.mark.parametrize(
    ("words", "heavy"),
    [
        ("--version", HEAVY),
        ("--help", HEAVY),
        ("env --help", HEAVY),
        ("evaluate --help", ("torch", "datasets", "accelerate", "peft")),  # TRL's parser
    ],
)
def test_a_question_imports_nothing_heavy(words: str, heavy: tuple[str, ...]) -> None:
    code = (
        "import sys\nfrom purified_opsd_trl import cli\ntry:\n    cli.main(sys.argv[1:])\n"
        f"except SystemExit as stopped:\n    assert not stopped.code\nassert not set({heavy}) & set(sys.modules)"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", code, *words.split()], capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stderr
    assert not done.stderr and ("0." in done.stdout or "help" in done.stdout)
    # CPU time, which other processes of the machine do not lengthen
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 2


def test_every_name_of_the_package_is_found() -> None:
    import purified_opsd_trl

    assert {name for name in purified_opsd_trl.__all__ if getattr(purified_opsd_trl, name, None) is None} == set()
    assert set(purified_opsd_trl.__all__) <= set(dir(purified_opsd_trl))
    with pytest.raises(AttributeError, match="no attribute 'Trainer'"):
        _ = purified_opsd_trl.Trainer


def test_noise_of_other_packages_is_dropped(caplog: pytest.LogCaptureFixture) -> None:
    quiet_start()
    line = "Failed to load CPU gemm_4bit_forward from kernels-community: %s. Please make sure"
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    logger.warning(line, "no kernels")
    logger.warning("Something else")
    assert [record.getMessage() for record in caplog.records] == ["Something else"]
    spec = find_spec("bitsandbytes")
    if spec is not None and spec.origin is not None:  # the package still logs it in these words
        assert line in (Path(spec.origin).parent / "backends/cpu/ops.py").read_text()


# Files of settings ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("pmi_center:\n", r"line 1: `pmi_center` has no value"),
        ("seed: 1\npmi_clip:  # none?\n", r"line 2: `pmi_clip` has no value"),
        ("seed: 1\nseed: 2\n", "line 2: `seed` is set twice"),
        ("seed: [1\n", "is not YAML"),
        ("", "must hold `key: value` lines"),
        ("- seed\n", "must hold `key: value` lines"),
        ("1: 2\n", "with text as keys"),
        ("epistemic_markers: wait, hmm\n", r"must be a list of text, got 'wait, hmm'\. Write .*`\[wait, hmm\]`"),
        ("reference_column: true\n", r"`reference_column` must be text, got True\. Put it in quotes"),
        ("pmi_center: null\n", "`pmi_center` must be true or false, got nothing"),
        ("seed: one\n", "`seed` must be an integer, got 'one'"),
        ("target: pmi\n", "`target` must be one of purified, teacher, contrastive, gated, interpolated, got 'pmi'"),
        ("pmi_beta: .nan\n", "`pmi_beta` must be a number, got nan|`pmi_beta` must be a number above 0, got nan"),
    ],
)
@pytest.mark.parametrize("join", [" ", "="])
def test_a_file_that_cannot_be_used(tmp_path: Path, text: str, message: str, join: str) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(text)
    with pytest.raises(InputError, match=message) as refused:
        make_parser().parse_known(f"--config{join}{file}".split())
    assert "\n" not in str(refused.value)


def test_one_word_is_a_list_of_one_as_on_the_command_line(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text("epistemic_markers: wait a minute\nlora_target_modules: all-linear\n")
    (_, training_args, model_args, _), _, _ = make_parser().parse_known(["--config", str(file)])
    assert training_args.epistemic_markers == ["wait a minute"]
    assert model_args.lora_target_modules == "all-linear"


@pytest.mark.parametrize("name", RENAMED)
def test_an_old_name_is_refused_with_the_new_one(name: str) -> None:
    with pytest.raises(InputError, match=f"`{name}` is now called `{RENAMED[name]}`"):
        make_parser().parse_known([f"--{name}", "x"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--pmi_beta x", "`pmi_beta` must be a number, got 'x'"),
        ("--pmi-center maybe", "`pmi_center` must be true or false, got 'maybe'"),
        ("--target pmi", "`target` must be one of purified, teacher, contrastive, gated, interpolated, got 'pmi'"),
        ("--epistemic_markers", "epistemic_markers.*expected at least one argument"),
        ("--config", "Name one file after `--config`"),
    ],
)
def test_an_option_that_cannot_be_used(words: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        make_parser().parse_known(words.split())


# Errors --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (InputError("a\n  b"), "error: a b"),
        (PermissionError(13, "Permission denied", "/data/run"), "error: /data/run: Permission denied."),
        (ConnectionError("refused"), "error: refused"),
        (ImportError("no vllm"), "error: no vllm"),
        (TimeoutError(), "error: TimeoutError"),
    ],
)
def test_an_error_that_a_user_can_fix_is_one_line(
    error: Exception, line: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert exit_status(error) == 2
    assert capsys.readouterr().err == f"{line}\n"
    monkeypatch.setenv(DEBUG_VARIABLE, "1")
    with pytest.raises(type(error)):
        exit_status(error)


def test_an_update_that_is_not_finite_is_one_line_with_status_1(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_status(FloatingPointError("Step 3: the loss\nis NaN")) == 1
    assert capsys.readouterr().err == "error: Step 3: the loss is NaN\n"


def test_the_launcher_prints_for_the_processes_that_it_started(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    assert exit_status(InputError("a")) == 2
    assert capsys.readouterr().err == "error: a\n"  # torchrun alone started it
    monkeypatch.setenv(LAUNCHED_VARIABLE, "1")
    assert exit_status(InputError("a")) == 2
    assert capsys.readouterr().err == ""
    data = json.loads((tmp_path / "error.json").read_text())
    assert data["message"] == "error: a" and isinstance(data["timestamp"], int)


def test_a_fault_of_the_program_keeps_its_traceback() -> None:
    with pytest.raises(ZeroDivisionError):
        exit_status(ZeroDivisionError("division by zero"))


@pytest.mark.parametrize(
    ("words", "raises"),
    [
        ("evaluate --seed x", False),
        ("--debug evaluate --seed x", True),
        ("evaluate --debug --seed x", True),
        ("evaluate --seed x --debug", True),
    ],
)
def test_debug_shows_the_traceback(
    words: str, raises: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(DEBUG_VARIABLE, "")  # so that it is restored
    if raises:
        with pytest.raises(InputError):
            cli.main(words.split())
    else:
        assert cli.main(words.split()) == 2
        assert capsys.readouterr().err == "error: `seed` must be an integer, got 'x'.\n"
