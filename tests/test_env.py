"""`purified-opsd env`: what it prints is what is installed, and nothing that should stay private."""

import importlib.metadata
import shutil
import subprocess
import sys
from pathlib import Path

import accelerate.commands.config
import pytest
import torch

from purified_opsd_trl import cli, env


def printed(capsys: pytest.CaptureFixture[str]) -> dict[str, str]:
    """The list that the command prints, read back."""
    assert cli.main(["env"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert all(line.startswith("- ") and ": " in line for line in lines)
    return dict(line.removeprefix("- ").split(": ", 1) for line in lines)


def test_what_it_prints(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("VLLM_API_KEY", "vllm_secret")
    monkeypatch.delenv("CUDA_LAUNCH_BLOCKING", raising=False)
    rows = printed(capsys)
    assert rows["Python"] == "{}.{}.{}".format(*sys.version_info)
    assert rows["torch"].startswith(f"{torch.__version__} (")
    pip = subprocess.run([sys.executable, "-m", "pip", "list", "--format=freeze"], capture_output=True, text=True)
    installed = dict(line.split("==") for line in pip.stdout.splitlines() if "==" in line)
    for name in ("trl", "transformers", "accelerate", "datasets", "peft", "deepspeed", "vllm", "bitsandbytes"):
        assert rows[name] == installed.get(name, "not installed")
    assert f", {torch.backends.cpu.get_cpu_capability()}, " in rows["CPU"]
    assert rows["OMP_NUM_THREADS"] == "7" and "CUDA_LAUNCH_BLOCKING" not in rows
    assert "secret" not in str(rows)
    if not torch.accelerator.is_available():
        assert rows["accelerators"] == "none"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_row_per_device(capsys: pytest.CaptureFixture[str]) -> None:
    rows = printed(capsys)
    for i in range(torch.cuda.device_count()):
        assert rows[f"accelerator {i}"].startswith(torch.cuda.get_device_name(i))
        assert "driver unknown" not in rows[f"accelerator {i}"]


def test_versions_leave_out_what_is_not_installed() -> None:
    assert env.versions(["trl", "no-such-package", "torch"]) == {
        name: importlib.metadata.version(name) for name in ("trl", "torch")
    }
    assert list(env.versions())[:2] == ["purified_opsd_trl", "trl"]


def git(folder: Path, *arguments: str) -> str:
    names = ("-c", "user.name=n", "-c", "user.email=e@example.org")
    command = ["git", "-C", str(folder), *names, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
def test_the_commit_is_that_of_a_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkout, then one with a change; an environment inside another repository has no commit."""
    package = tmp_path / "purified_opsd_trl"
    site = tmp_path / ".venv/site-packages/purified_opsd_trl"
    for folder in (package, site):
        folder.mkdir(parents=True)
        (folder / "env.py").write_text("")
    git(tmp_path, "init", "--quiet")
    git(tmp_path, "add", "purified_opsd_trl")
    monkeypatch.setattr(env, "__file__", str(package / "env.py"))
    assert env.commit() is None  # no commit yet
    git(tmp_path, "commit", "--quiet", "--message=first")
    git(tmp_path, "tag", "--annotate", "--message=first", "v1")
    head = git(tmp_path, "rev-parse", "--short=12", "HEAD")
    assert env.commit() == head
    (package / "env.py").write_text("changed")
    assert env.commit() == f"{head}-dirty"
    monkeypatch.setattr(env, "__file__", str(site / "env.py"))
    assert env.commit() is None
    monkeypatch.setenv("PATH", "")  # no git
    monkeypatch.setattr(env, "__file__", str(package / "env.py"))
    assert env.commit() is None


def test_accelerate_defaults_are_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What `accelerate launch` reads when no file is named decides how a run was started."""
    file = tmp_path / "default_config.yaml"
    monkeypatch.setattr(accelerate.commands.config, "default_config_file", str(file))
    assert env.environment()["accelerate's default file"] == "none"
    file.write_text("num_processes: 3\n\nmixed_precision: bf16\n")
    assert env.environment()["accelerate's default file"] == "num_processes: 3; mixed_precision: bf16"


def test_a_wrong_flag(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(["env", "--json"])
    assert stopped.value.code == 2 and "unrecognized arguments: --json" in capsys.readouterr().err
