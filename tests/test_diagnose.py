"""`purified-opsd diagnose` against the oracle, and its page in a real browser."""

import copy
import datetime
import html
import json
import re
import shutil
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from purified_opsd_trl import InputError, cli
from purified_opsd_trl.diagnose.arguments import RENAMED, parse
from purified_opsd_trl.diagnose.measure import DISTRIBUTIONS, Models, summarize
from purified_opsd_trl.diagnose.render import html_page, verdict
from purified_opsd_trl.evaluate.backends import TransformersBackend
from purified_opsd_trl.head import LMHead
from purified_opsd_trl.monitoring.decomposition import STATISTICS
from tests import reference
from tests.browser import accessibility_violations, chromium, evaluate_in_page, html_errors, overflow, requests_made
from tests.conftest import FIXTURES


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory, make_model: Callable[..., Any]) -> Path:
    """A run with two adapter checkpoints."""
    folder = tmp_path_factory.mktemp("run")
    for step in (5, 10):
        model = get_peft_model(copy.deepcopy(make_model()), LoraConfig(r=2, target_modules=["q_proj", "up_proj"]))
        torch.manual_seed(step)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.data.normal_(std=0.02 * step)
        model.save_pretrained(folder / f"checkpoint-{step}")
        (folder / f"checkpoint-{step}" / "trainer_state.json").write_text('{"global_step": 1}')
    shutil.copytree(folder / "checkpoint-10", folder / "checkpoint-15")
    (folder / "checkpoint-15" / "trainer_state.json").unlink()  # killed while it was written
    return folder


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory, model_dir: Path, run_dir: Path) -> Path:
    folder = tmp_path_factory.mktemp("diagnosis")
    data = FIXTURES / "data" / "conversational.jsonl"
    flags = (
        f"diagnose --model_name_or_path {model_dir} --checkpoints {run_dir} --dataset_name {data} "
        f"--num_samples 4 --num_pages 3 --max_completion_length 24 --dtype float32 --alternatives 3 "
        f"--output_dir {folder}"
    )
    assert cli.main(flags.split()) == 0
    return folder


@pytest.fixture(scope="module")
def diagnosis(output: Path) -> dict[str, Any]:
    return json.loads((output / "diagnosis.json").read_text())


def test_every_number_equals_the_oracle(
    diagnosis: dict[str, Any], make_model: Callable[..., Any], tokenizer: Any, run_dir: Path
) -> None:
    assert [s["label"] for s in diagnosis["students"]][1:] == [f"{run_dir.name}-checkpoint-{n}" for n in (5, 10)]
    assert [s["step"] for s in diagnosis["students"]] == [0, 5, 10]
    from peft import PeftModel

    frozen = make_model().double()
    for student in (diagnosis["students"][0], diagnosis["students"][2]):
        trained = make_model()
        if student["step"]:
            trained = PeftModel.from_pretrained(trained, run_dir / "checkpoint-10")
        trained = trained.double().eval()
        sample = student["samples"][1]
        rows = [json.loads(line) for line in (FIXTURES / "data" / "conversational.jsonl").read_text().splitlines()]
        row = next(r for r in rows if r["prompt"][-1]["content"] == sample["prompt"].split("user: ")[-1])
        completion = [token for piece in sample["pieces"] for token in encode(tokenizer, piece)]
        instruction = (
            "Use the worked solution to understand the problem, then solve the problem yourself, step by step."
        )
        shown = f"Worked solution of this problem:\n{row['reference']}\n\n{instruction}"
        system = [turn for turn in row["prompt"] if turn["role"] == "system"]
        question = row["prompt"][-1]["content"]
        contexts = {
            "student": row["prompt"],
            "base": row["prompt"],
            "teacher": [*row["prompt"][:-1], {"role": "user", "content": f"{question}\n\n{shown}"}],
            "reference_only": [*system, {"role": "user", "content": shown}],
        }
        logits = {}
        for name, messages in contexts.items():
            prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
            model = trained if name == "student" else frozen
            with torch.no_grad():
                logits[name] = model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
        expected = reference.decompose(logits["student"], logits["teacher"], logits["reference_only"])
        for name in STATISTICS:
            assert sample[name] == pytest.approx(getattr(expected, name).tolist(), rel=1e-3, abs=1e-4), name
        for i, token in enumerate(completion):
            for name in ("total", "ref", "it"):
                value = getattr(expected, name)[i, token].item()
                assert sample[f"delta_{name}"][i] == pytest.approx(value, abs=1e-3)
            for name in DISTRIBUTIONS:
                probabilities = logits[name][i].softmax(-1)
                assert sample[f"logprob_{name}"][i] == pytest.approx(probabilities[token].log().item(), abs=1e-3)
                top = probabilities.topk(3).values.tolist()
                assert [p for _, p in sample["alternatives"][i][name]] == pytest.approx(top, abs=1e-4)


def test_checkpoints_may_be_full_models(
    tmp_path: Path, model_dir: Path, make_model: Callable[..., Any], tokenizer: Any
) -> None:
    moved = make_model(seed=3)
    moved.save_pretrained(tmp_path / "run" / "checkpoint-3")
    tokenizer.save_pretrained(tmp_path / "run" / "checkpoint-3")
    (tmp_path / "run" / "checkpoint-3" / "trainer_state.json").write_text('{"global_step": 3}')
    data = tmp_path / "data.jsonl"
    data.write_text(json.dumps({"prompt": [{"role": "user", "content": "1 + 1?"}], "reference": "2"}) + "\n")
    flags = (
        f"diagnose --model_name_or_path {model_dir} --checkpoints {tmp_path / 'run'} --dataset_name {data} "
        f"--num_samples 1 --max_completion_length 8 --dtype float32 --output_dir {tmp_path / 'out'}"
    )
    assert cli.main(flags.split()) == 0
    _, student = json.loads((tmp_path / "out" / "diagnosis.json").read_text())["students"]
    (sample,) = student["samples"]
    completion = [token for piece in sample["pieces"] for token in encode(tokenizer, piece)]
    messages = [{"role": "user", "content": "1 + 1?"}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
    for name, model in (("student", moved), ("base", make_model())):
        with torch.no_grad():
            logits = model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
        expected = logits.log_softmax(-1).gather(-1, torch.tensor(completion).unsqueeze(-1))[:, 0].tolist()
        assert sample[f"logprob_{name}"] == pytest.approx(expected, abs=1e-3), name


def save_adapter(folder: Path, model: Any, **config: Any) -> str:
    model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], **config))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.5)
    model.save_pretrained(folder)
    return str(folder)


def test_every_student_meets_the_same_base(tmp_path: Path, model_dir: Path, make_model: Callable[..., Any]) -> None:
    head = make_model().lm_head.weight
    models = Models(TransformersBackend(str(model_dir), "float32", 1))
    for name in ("a", "b", None):
        models.use(None, name and save_adapter(tmp_path / name, make_model(), modules_to_save=["lm_head"]))
        with models.frozen() as frozen:
            assert torch.equal(LMHead.from_model(frozen).weight, head)
        with models.trained() as trained:
            assert torch.equal(LMHead.from_model(trained).weight, head) is (name is None)


def test_an_adapter_that_changes_the_base_is_refused(
    tmp_path: Path, model_dir: Path, make_model: Callable[..., Any]
) -> None:
    models = Models(TransformersBackend(str(model_dir), "float32", 1))
    adapter = save_adapter(tmp_path, make_model(), init_lora_weights="pissa")
    with pytest.raises(InputError, match=r"changes weights of the base itself \(model.layers.0.self_attn.q_proj"):
        models.use(None, adapter)


def encode(tokenizer: Any, piece: str) -> list[int]:
    special = tokenizer.convert_tokens_to_ids(piece) if piece.startswith("<") and len(piece) > 1 else None
    return [special] if special is not None else list(piece.encode())


@pytest.fixture(autouse=True, scope="module")
def _ascii_completions() -> Any:
    """Completions in ASCII, so that a token's text gives its id back."""
    from purified_opsd_trl.evaluate.backends import TransformersBackend

    original = TransformersBackend.generate

    def generate(self: Any, requests: Any, sampling: Any) -> Any:
        from purified_opsd_trl.evaluate.backends import Completion

        for completion in original(self, requests, sampling):
            ids = [32 + i % 95 if i < 256 else i for i in completion.ids]
            ids = [i if i < 128 else 65 for i in ids] or [65]
            ids = list(b"Wait, 2 + 3 = 5. ") + [i for i in ids if i != ord("<")]
            yield Completion(completion.key, ids, completion.truncated)

    TransformersBackend.generate = generate  # type: ignore[method-assign]
    yield
    TransformersBackend.generate = original  # type: ignore[method-assign]


def test_the_summary_is_the_mean_over_tokens(diagnosis: dict[str, Any]) -> None:
    for student in diagnosis["students"]:
        values = [v for sample in student["samples"] for v in sample["mass_cos_total_ref"]]
        groups = student["summary"]["groups"]
        assert groups["all"]["mass_cos_total_ref"] == pytest.approx(sum(values) / len(values))
        assert groups["all"]["tokens"] == len(values)
        epistemic = [
            sample["delta_ref"][i]
            for sample in student["samples"]
            for i, kind in enumerate(sample["classes"])
            if kind == 0
        ]
        assert groups["epistemic"]["tokens"] == len(epistemic) >= 16
        assert groups["epistemic"]["delta_ref"] == pytest.approx(sum(epistemic) / len(epistemic))
        assert sum(groups[f"{t}_third"]["tokens"] for t in ("first", "middle", "last")) == len(values)
        assert sum(part["tokens"] for part in student["summary"]["along_completion"]) == len(values)
        assert student["summary"]["markers_per_1k"]["wait"] == pytest.approx(1000 * 4 / len(values))


def test_without_training_student_and_base_are_one(diagnosis: dict[str, Any]) -> None:
    for sample in diagnosis["students"][0]["samples"]:
        assert sample["logprob_student"] == sample["logprob_base"]
    moved = diagnosis["students"][2]["samples"][0]
    assert moved["logprob_student"] != moved["logprob_base"]


def test_groups_without_tokens_are_empty() -> None:
    assert summarize([])["groups"]["epistemic"] == {"tokens": 0}


def test_ratios_are_of_sums_and_medians_of_tokens(diagnosis: dict[str, Any]) -> None:
    for student in diagnosis["students"]:
        for group, kind in (("all", None), ("epistemic", 0)):
            chosen = [
                {name: sample[name][i] for name in STATISTICS}
                for sample in student["samples"]
                for i, own in enumerate(sample["classes"])
                if kind in (None, own)
            ]
            reported = student["summary"]["groups"][group]
            for mass in ("", "mass_"):
                ref, total = (sum(token[f"{mass}norm_{part}"] for token in chosen) for part in ("ref", "total"))
                assert reported[f"{mass}norm_ratio_ref"] == pytest.approx(ref / total)
                ratios = [t[f"{mass}norm_ref"] / t[f"{mass}norm_total"] for t in chosen if t[f"{mass}norm_total"]]
                zeros = [0.0] * (len(chosen) - len(ratios))
                expected = statistics.median([*zeros, *ratios])
                assert reported[f"{mass}median_norm_ratio_ref"] == pytest.approx(expected, rel=1e-5)
            mean = statistics.fmean(token["norm_ratio_ref"] for token in chosen)
            assert reported["paper_norm_ratio_ref"] == pytest.approx(mean)


@pytest.mark.parametrize(("cosine", "words"), [(0.8, "mostly"), (0.79, "partly"), (0.39, "to a small extent")])
@pytest.mark.parametrize("samples", [29, 30])
def test_the_verdict_names_the_share_and_few_completions(
    diagnosis: dict[str, Any], cosine: float, words: str, samples: int
) -> None:
    summary = copy.deepcopy(diagnosis["students"][0]["summary"]) | {"samples": samples}
    summary["groups"]["all"] |= {"mass_cos_total_ref": cosine, "mass_norm_ratio_ref": 1.239}
    text = verdict(summary)
    assert f"points {words} along" in text and f"= {cosine:.2f}" in text and "1.24 times" in text
    assert ("tendency only" in text) is (samples < 30)


def test_the_top_of_the_page_identifies_the_diagnosis(
    output: Path, diagnosis: dict[str, Any], model_dir: Path, run_dir: Path
) -> None:
    text = (output / "diagnosis.html").read_text()
    top = text[text.index("<main>") : text.index("Token by token")]
    year = datetime.datetime.fromtimestamp(diagnosis["started"], datetime.UTC).strftime("%Y-%m-%d")
    for fact in (str(model_dir), "conversational.jsonl, 4 problems", f"{run_dir.name}-checkpoint-10", year, "trl 1."):
        assert fact in top, fact
    assert html.escape(verdict(diagnosis["students"][-1]["summary"])) in top
    assert "Δ ref</dt><dd>Probe against student" in top and "Δ it</dt><dd>Teacher against probe" in top


def test_text_of_a_completion_cannot_break_the_page(diagnosis: dict[str, Any]) -> None:
    hostile = "</script><script>document.title='broken'</script><!--<script>"
    changed = copy.deepcopy(diagnosis)
    changed["students"][0]["samples"][0]["pieces"][0] = hostile
    changed["students"][0]["samples"][0]["prompt"] = hostile
    changed["students"][0]["label"] = hostile
    text = html_page(changed)
    assert text.count("<script") == 2 and text.count("</script>") == 2 and "<!--" not in text


# The page in a browser -----------------------------------------------------------------------------------------------


def test_the_page_asks_for_nothing(output: Path) -> None:
    text = (output / "diagnosis.html").read_text()
    assert not re.search(r"""(?:src|href)=["'](?!data:)|url\(|https?://(?!www\.w3\.org)|@import""", text)
    assert requests_made(text) == []


@chromium
@pytest.mark.parametrize("width", [360, 768, 1280])
def test_the_page_does_not_scroll_sideways(output: Path, tmp_path: Path, width: int) -> None:
    assert overflow(output / "diagnosis.html", tmp_path, width) == []


@chromium
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_the_page_has_no_accessibility_violations(output: Path, tmp_path: Path, dark: bool) -> None:
    assert accessibility_violations(output / "diagnosis.html", tmp_path, dark=dark) == []


def test_the_page_is_valid_html(output: Path) -> None:
    assert html_errors((output / "diagnosis.html").read_text()) == []


@chromium
def test_the_page_works_by_keyboard_and_pointer(output: Path, tmp_path: Path, diagnosis: dict[str, Any]) -> None:
    script = """
    const box = document.getElementById("tokens"), seen = {};
    const selected = () => Number(box.querySelector('[aria-selected="true"]').dataset.i);
    const press = (key) => box.dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true }));
    seen.tokens = box.children.length;
    seen.text = box.textContent;
    press("ArrowRight"); press("ArrowRight"); seen.right = selected();
    press("ArrowLeft"); seen.left = selected();
    press("End"); seen.end = selected();
    press("Home"); seen.home = selected();
    press("ArrowDown"); press("n"); seen.next = selected();
    press("p"); seen.previous = selected();
    seen.active = document.getElementById(box.getAttribute("aria-activedescendant")).dataset.i;
    box.children[5].dispatchEvent(new MouseEvent("click", { bubbles: true }));
    box.children[5].dispatchEvent(new MouseEvent("click", { bubbles: true }));
    box.children[7].dispatchEvent(new MouseEvent("mousemove", { bubbles: true })); seen.hover = selected();
    seen.details = document.getElementById("details").textContent;
    seen.label = box.children[7].getAttribute("aria-label");
    document.querySelector("input[value=delta_it]").click();
    seen.other = box.children[7].getAttribute("aria-label");
    const student = document.getElementById("student");
    student.selectedIndex = 2; student.dispatchEvent(new Event("change"));
    seen.checkpoint = box.textContent;
    return seen;
    """
    seen = evaluate_in_page(output / "diagnosis.html", script, tmp_path)
    first, last = diagnosis["students"][0]["samples"][0], diagnosis["students"][2]["samples"][0]
    assert seen["tokens"] == len(first["pieces"]) and seen["text"] == "".join(first["pieces"])
    assert (seen["right"], seen["left"], seen["home"]) == (2, 1, 0) and seen["end"] == len(first["pieces"]) - 1
    assert seen["previous"] == 3  # the last letter of "Wait"
    assert seen["active"] == "3" and seen["hover"] == 7
    signed = [f"{'−' if v < 0 else '+'}{abs(v):.2f}" for v in (first["delta_ref"][7], first["delta_it"][7])]
    assert seen["label"].endswith(signed[0]) and seen["other"].endswith(signed[1])
    assert "teacher (question + reference)" in seen["details"] and signed[0] in seen["details"]
    assert seen["checkpoint"] == "".join(last["pieces"])


# Bad input -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ("--num_samples 0", "`num_samples` must be an integer at least 1, got 0"),
        ("--dataset_reference_column solution", "no column `solution`"),
        ("--dataset_prompt_column problem", "no column `problem`"),
        ("--temperature 0", "`temperature` must be a number above 0, got 0"),
        ("--temperature nan", "`temperature` must be a number above 0, got nan"),
        ("--chat_template_kwargs {", "`chat_template_kwargs` must be a mapping, or one as JSON"),
        *((f"--{old} x", f"`{old}` is now called `{new}`.") for old, new in RENAMED.items()),
    ],
)
def test_bad_input_is_one_line(
    extra: str, message: str, model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = FIXTURES / "data" / "conversational.jsonl"
    flags = f"diagnose --model_name_or_path {model_dir} --dataset_name {data} --output_dir {tmp_path} {extra}"
    assert cli.main(flags.split()) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_an_unwritable_folder_is_known_before_anything_is_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    flags = f"diagnose --model_name_or_path nowhere --dataset_name nothing --output_dir {tmp_path / 'file' / 'out'}"
    assert cli.main(flags.split()) == 2
    assert "out cannot be written: Not a directory" in capsys.readouterr().err


def test_settings_come_from_a_file_too(tmp_path: Path) -> None:
    path = tmp_path / "diagnose.yaml"
    path.write_text("model_name_or_path: m\ndataset_name: d\nchat_template_kwargs: {enable_thinking: true}\nseed: 3\n")
    args = parse(["--config", str(path), "--seed", "4"])
    assert (args.model_name_or_path, args.seed, args.template_kwargs) == ("m", 4, {"enable_thinking": True})
