"""Comparisons of results, ours and those of inspect_ai."""

import copy
import importlib.util
import json
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from purified_opsd_trl import InputError, cli
from purified_opsd_trl.evaluate.compare import compare, load_results, markdown
from purified_opsd_trl.evaluate.paper import paper_rows

from ..conftest import FIXTURES


def results(label: str, values: list[float], **settings: Any) -> dict[str, Any]:
    """Results of one benchmark, as `results.json` holds them."""
    return {
        "label": label,
        "num_samples": 4,
        "settings": {"model": "org/Qwen3-8B", "adapter": None, "temperature": 0.6, **settings},
        "benchmarks": {
            "aime24": {
                "per_problem": {"avg@4": {str(i): value for i, value in enumerate(values)}},
                "tokens": {"mean": 100.0},
                "truncation_rate": 0.0,
                "answer_rate": 1.0,
                "markers_per_1k": {"total": 3.0},
            }
        },
    }


def test_differences_are_paired() -> None:
    rng = np.random.default_rng(0)
    before = rng.choice([0.0, 1.0], size=30).tolist()
    after = [value + 0.1 for value in before]
    row = compare([results("base", before), results("new", after)])["table"]["aime24"]["new"]
    assert row["difference"] == pytest.approx(10.0)
    assert row["difference_interval_95"] == pytest.approx([10.0, 10.0])  # every problem moved alike
    low, high = row["interval_95"]
    assert high - low > 20  # while the means themselves are this uncertain


def test_the_table_shows_the_paper_where_the_model_matches() -> None:
    text = markdown(compare([results("base", [0.5, 1.0]), results("new", [1.0, 1.0], temperature=1.0)]))
    assert "| *paper: purified, DASD-10K* | 79.4 |" in text
    assert "| new | 100.0 [100.0, 100.0]<br>+25.0 [+0.0, +50.0] |" in text
    assert "Different settings: `temperature` (base: 0.6, new: 1.0)" in text
    retrained = compare([results("base", [0.5, 1.0]), results("new", [1.0, 1.0], adapter="a", adapter_weights="b")])
    assert retrained["settings_that_differ"] == {}
    assert paper_rows("SmolLM2", ["aime24"]) == {}
    assert paper_rows("Qwen/Qwen3-4B", ["aime24", "aime25", "hmmt25"])["purified, DASD-10K"]["average"] == 63.7
    assert paper_rows("Qwen/Qwen3-4B", ["mine"]) == {}


def test_compare_writes_table_and_figure(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the extra `plot` is not installed")
    for name, values in (("a", [0.5, 0.25]), ("b", [1.0, 0.5])):
        (tmp_path / f"{name}.json").write_text(json.dumps(results(name, values)))
    out = tmp_path / "cmp"
    files = [str(tmp_path / "a.json"), str(tmp_path / "b.json")]
    assert cli.main(["evaluate", "--compare", *files, "--output_dir", str(out)]) == 0
    assert json.loads((out / "comparison.json").read_text())["table"]["aime24"]["b"]["difference"] == 37.5
    assert (out / "comparison.png").read_bytes().startswith(b"\x89PNG")


def test_results_that_cannot_be_paired_are_refused(tmp_path: Path) -> None:
    for name, values in (("a", [0.5, 0.25]), ("b", [1.0])):
        (tmp_path / f"{name}.json").write_text(json.dumps(results(name, values)))
    with pytest.raises(InputError, match="not evaluated on the same problems"):
        load_results([str(tmp_path / "a.json"), str(tmp_path / "b.json")])


def test_results_on_other_problems_of_the_same_names_are_refused(tmp_path: Path) -> None:
    hashes = {"a": {"aime24": {"0": "x", "1": "y"}}, "b": {"aime24": {"0": "x", "1": "z"}}, "old": None}
    for name, of_problems in hashes.items():
        extra = {"problem_sha256": of_problems} if of_problems else {}
        (tmp_path / f"{name}.json").write_text(json.dumps({**results(name, [0.5, 0.25]), **extra}))
    with pytest.raises(InputError, match="not evaluated on the same problems"):
        load_results([str(tmp_path / "a.json"), str(tmp_path / "b.json")])
    assert len(load_results([str(tmp_path / "a.json"), str(tmp_path / "old.json")])) == 2
    with pytest.raises(InputError, match="at least two results"):
        load_results([str(tmp_path / "a.json")])
    with pytest.raises(InputError, match="no file"):
        load_results([str(tmp_path / "c.json")])


@pytest.mark.parametrize("text", ['{"label": "a", "benchm', "[]", '{"benchmarks": {}}', '{"num_samples": 4}', "7", ""])
def test_damaged_results_are_named(tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.json").write_text(json.dumps(results(name, [0.5, 0.25])))
    (tmp_path / "b.json").write_text(text)
    paths = [str(tmp_path / "a.json"), str(tmp_path / "b.json")]
    assert cli.main(["evaluate", "--compare", *paths, "--output_dir", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert "b.json" in error and error.count("\n") == 1 and not (tmp_path / "out").exists()


LOGS = FIXTURES / "inspect_ai"


def archive(log: Path, path: Path, **changes: Any) -> str:
    """A log as inspect_ai packs it."""
    content = {**json.loads(log.read_text()), **changes}
    samples = content.pop("samples")
    path.parent.mkdir(exist_ok=True)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("header.json", json.dumps(content))
        for sample in samples:
            file.writestr(f"samples/{sample['id']}_epoch_{sample['epoch']}.json", json.dumps(sample))
        file.writestr("summaries.json", "[]")
    return str(path)


@pytest.mark.parametrize("packed", ["files", "archives", "folders"])
def test_logs_of_inspect_ai_are_paired(packed: str, tmp_path: Path) -> None:
    paths = [str(LOGS / "base.json"), str(LOGS / "new.json")]
    if packed != "files":
        paths = [archive(LOGS / f"{name}.json", tmp_path / name / "1_sums.eval") for name in ("base", "new")]
    if packed == "folders":
        paths = [str(Path(path).parent) for path in paths]
    comparison = compare(load_results(paths))
    base, new = comparison["table"]["sums"].values()
    # Epochs right, of two: base 1, 2, 1; new 2, 1, 2
    assert (base["mean"], new["mean"]) == (pytest.approx(100 * 4 / 6), pytest.approx(100 * 5 / 6))
    assert new["difference"] == pytest.approx(100 / 6)
    assert list(comparison["table"]["sums"]) == (
        ["base", "new"] if packed == "folders" else ["mockllm/model (1)", "mockllm/model (2)"]
    )
    behavior = next(iter(comparison["behavior"].values()))["sums"]
    tokens = [20, 25, 30, 35, 40, 45]  # one sample of six cut, a "Wait" and a "check" in each
    assert behavior == {
        "tokens": sum(tokens) / 6,
        "truncation_rate": 1 / 6,
        "answer_rate": 1.0,
        "markers_per_1k": pytest.approx(1000 * 12 / sum(tokens)),
    }
    assert load_results(paths)[0]["settings"] == {
        "model": "mockllm/model",
        "scorer": "match",
        "max_tokens": 64,
        "temperature": 0.7,
    }


def test_logs_without_token_counts_say_so(tmp_path: Path) -> None:
    samples = json.loads((LOGS / "base.json").read_text())["samples"]
    for sample in samples:
        del sample["output"]["usage"]
    path = archive(LOGS / "base.json", tmp_path / "x" / "log.eval", samples=samples)
    text = markdown(compare(load_results([path, str(LOGS / "new.json")])))
    assert "| mockllm/model (1) | sums | unknown | 17% | 100% | unknown |" in text


def test_logs_that_cannot_be_paired_are_refused(tmp_path: Path) -> None:
    log = json.loads((LOGS / "base.json").read_text())
    cut = [sample for sample in log["samples"] if (sample["id"], sample["epoch"]) != ("p1", 2)]
    partial = copy.deepcopy(log["samples"])
    partial[3]["scores"]["match"]["value"] = 0.5
    unscored = copy.deepcopy(log["samples"])
    unscored[3]["scores"] = None
    other = copy.deepcopy(log["samples"])
    for sample in other:
        sample["input"] += "?"
    for changes, message in (
        ({"status": "cancelled"}, r"is no finished evaluation \(status `cancelled`\)"),
        ({"samples": []}, "is no finished evaluation"),
        ({"samples": cut}, "not every problem has the same number of samples"),
        ({"samples": partial}, "sample p0, epoch 2: expected a score of C, I, 1, 0, true or false, got 0.5"),
        ({"samples": unscored}, "sample p0, epoch 2: expected a score .* got None"),
        ({"samples": other}, "not evaluated on the same problems"),
    ):
        path = archive(LOGS / "base.json", tmp_path / "logs" / "1.eval", **changes)
        with pytest.raises(InputError, match=message):
            load_results([str(LOGS / "new.json"), path])
    # One folder holds the logs of one model, one per task
    archive(LOGS / "base.json", tmp_path / "logs" / "1.eval")
    archive(LOGS / "new.json", tmp_path / "logs" / "2.eval")
    with pytest.raises(InputError, match="must hold logs of one model, one per task"):
        load_results([str(tmp_path / "logs"), str(LOGS / "new.json")])


def test_an_archive_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    path = Path(archive(LOGS / "base.json", tmp_path / "x" / "1.eval"))
    packed = path.read_bytes()
    path.write_bytes(packed[: len(packed) // 2])
    with pytest.raises(InputError, match="1.eval is damaged or is no log of inspect_ai"):
        load_results([str(path), str(path)])
    if importlib.util.find_spec("zipfile_zstd") is None and sys.version_info < (3, 14):
        # Method 93 in place of 8, in the entries and in the directory
        path.write_bytes(packed.replace(b"\x08\x00", b"\x5d\x00"))
        with pytest.raises(InputError, match="compressed with Zstandard.*inspect log convert --to json"):
            load_results([str(path), str(path)])
