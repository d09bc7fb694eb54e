"""Vision-language students against computations by hand: the model's logits, one row and one context at a time."""

import copy
import io
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset, Image
from peft import LoraConfig
from transformers import AutoTokenizer

from purified_opsd_trl import InputError, PurifiedOPSDConfig, PurifiedOPSDTrainer, build_contexts
from purified_opsd_trl.collator import PurificationCollator
from purified_opsd_trl.config import DEFAULT_REFERENCE_PROMPT_TEMPLATE, DEFAULT_TEACHER_PROMPT_TEMPLATE
from purified_opsd_trl.dataset import row_blocks
from purified_opsd_trl.images import images_of, token_bound
from purified_opsd_trl.multimodal import encode
from purified_opsd_trl.rollout.served import ServedTrainer
from purified_opsd_trl.rows import RowReader
from tests import reference
from tests.trainer_cases import assert_one_step, move_student, one_step
from tests.vision import CONFIGS, IDS, build_processor, build_vlm, image_rows, picture


# The language model's layers alone, as the recipe has it
LORA = LoraConfig(r=4, lora_alpha=8, target_modules=r".*language_model.*\.(q_proj|up_proj)", task_type="CAUSAL_LM")
INSTRUCTION = "Use the worked solution to understand the problem, then solve the problem yourself, step by step."

Build = Callable[..., PurifiedOPSDTrainer]
family = pytest.mark.parametrize("name", CONFIGS)


def mixed_rows() -> list[dict[str, Any]]:
    """Four rows: images of several sizes, two in one row, and none in another."""
    rows = image_rows(4)
    for row in rows:
        row["images"] = [row.pop("image")]
    rows[1]["images"] = None
    rows[2]["images"].append(picture(9, 24, 16))
    return rows


@pytest.fixture
def build(arguments: dict[str, Any]) -> Build:
    """Factory of trainers on a tiny vision-language model."""

    def make(name: str, lora: bool = False, rows: list[dict[str, Any]] | None = None, **fields: Any) -> Any:
        tools = fields.pop("tools", None)
        return PurifiedOPSDTrainer(
            model=build_vlm(name),
            args=PurifiedOPSDConfig(**{**arguments, "per_device_train_batch_size": 4, **fields}),
            train_dataset=Dataset.from_list(mixed_rows() if rows is None else rows),
            processing_class=build_processor(name),
            peft_config=copy.deepcopy(LORA) if lora else None,
            tools=tools,
        )

    return make


def fixed_rollout(trainer: PurifiedOPSDTrainer) -> None:
    """Replaces sampling by letters that depend on the prompt alone, of unequal lengths."""

    def generate(prompt_ids: list[list[int]], *_: Any, **__: Any) -> list[list[int]]:
        completions = []
        for ids in prompt_ids:
            generator = torch.Generator().manual_seed(sum(ids))
            completions.append(torch.randint(97, 123, (3 + sum(ids) % 5,), generator=generator).tolist())
        return completions

    trainer._generate_single_turn = generate  # type: ignore[method-assign]


def hand_messages(row: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """The three prompts of a row, written out: images before the question's text, and none for the probe."""
    images = [{"type": "image", "image": image} for image in row["images"] or []]
    question = row["prompt"][-1]["content"]
    shown = f"Worked solution of this problem:\n{row['reference']}\n\n{INSTRUCTION}"
    return {
        "base": [{"role": "user", "content": [*images, {"type": "text", "text": question}]}],
        "teacher": [{"role": "user", "content": [*images, {"type": "text", "text": f"{question}\n\n{shown}"}]}],
        "reference_only": [{"role": "user", "content": [{"type": "text", "text": shown}]}],
    }


def hand_logits(
    model: Any, processor: Any, messages: list[dict[str, Any]], completion: list[int], tool_images: list[Any]
) -> torch.Tensor:
    """Logits `[n, V]` of a completion of n tokens from the model's own forward, without padding."""
    inputs = processor.apply_chat_template(
        [messages], add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    prompt = inputs.pop("input_ids")
    ids = torch.cat([prompt, torch.tensor([completion])], dim=1)
    inputs.pop("attention_mask")
    for kind in ("token_type_ids", "mm_token_type_ids"):
        if kind in inputs:
            inputs[kind] = (
                (ids == processor.image_token_id).long() if kind.startswith("mm") else _padded(inputs[kind], ids)
            )
    if tool_images:
        images = [part["image"] for message in messages for part in message["content"] if part["type"] == "image"]
        inputs |= processor.image_processor(images=[*images, *tool_images], return_tensors="pt")
    inputs = {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}
    return model(input_ids=ids, **inputs).logits[0, prompt.shape[1] - 1 : -1]


def _padded(types: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    return torch.cat([types, types.new_zeros(1, ids.shape[1] - types.shape[1])], dim=1)


def by_hand(
    trainer: PurifiedOPSDTrainer,
    initial: Any,
    prompts: list[dict[str, Any]],
    completions: list[list[int]],
    written: list[list[int]] | None = None,
    tool_images: list[list[Any]] | None = None,
) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients in fp64; `written` marks the tokens that carry loss."""
    student, frozen = copy.deepcopy(trainer.model).double().train(), copy.deepcopy(initial).double().eval()
    written = written or [[1] * len(completion) for completion in completions]
    count, loss = sum(map(sum, written)), torch.zeros(())
    for i, (messages, completion) in enumerate(zip(prompts, completions, strict=True)):
        images = tool_images[i] if tool_images else []
        with torch.no_grad():
            scored = {
                context: hand_logits(frozen, trainer.processing_class, turns, completion, images)
                for context, turns in messages.items()
            }
        own = hand_logits(student, trainer.processing_class, messages["base"], completion, images)
        weights = torch.tensor(written[i], dtype=torch.float64) / count
        result = reference.objective(
            own,
            scored["base"],
            scored["teacher"],
            scored["reference_only"],
            weights,
            beta=0.5,
            pmi_beta=1.0,
            pmi_clip=10.0,
        )
        loss = loss + result.loss
    loss.backward()
    return loss.item(), {n: p.grad for n, p in student.named_parameters() if p.requires_grad and p.grad is not None}


def completions_for(trainer: PurifiedOPSDTrainer, rows: list[dict[str, Any]]) -> list[list[int]]:
    prompts = [hand_messages(row)["base"] for row in rows]
    encoded = [encode(trainer.processing_class, prompt)[0] for prompt in prompts]
    return trainer._generate_single_turn(encoded, None, {})


# Training ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
@family
def test_one_step_equals_the_computation_by_hand(build: Build, name: str, lora: bool) -> None:
    trainer = build(name, lora)
    move_student(trainer)
    fixed_rollout(trainer)
    rows = mixed_rows()
    expected = by_hand(trainer, build_vlm(name), [hand_messages(row) for row in rows], completions_for(trainer, rows))
    assert expected[0] > 1e-3
    assert_one_step(trainer, [trainer.train_dataset[i] for i in range(4)], *expected)


@pytest.mark.parametrize("name", ["qwen3_vl", "llava_next"])
def test_accumulation_scoring_batches_and_parts_change_nothing(build: Build, name: str) -> None:
    moves = []
    started = dict(build_vlm(name).named_parameters())
    for size, scored, budget in ((4, None, None), (1, 1, None), (4, None, 100)):  # a row has about 60 tokens
        trainer = build(
            name,
            max_steps=1,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=4 // size,
            scoring_batch_size=scored,
            train_token_budget=budget,
            optim="sgd",
            max_grad_norm=0.0,
            learning_rate=1.0,
        )
        fixed_rollout(trainer)
        trainer.train()
        moves.append({n: p.detach() - started[n].detach() for n, p in trainer.model.named_parameters()})
    scale = max(move.abs().max().item() for move in moves[0].values())
    for other in moves[1:]:
        for parameter, move in moves[0].items():
            torch.testing.assert_close(other[parameter], move, rtol=1e-3, atol=1e-5 * scale, msg=parameter)


def test_the_probe_sees_no_image_and_the_others_do(build: Build) -> None:
    trainer = build("qwen3_vl")
    fixed_rollout(trainer)
    seen: dict[tuple[str, int], int] = {}
    batches = trainer.purification_collator.scoring_batches

    def spy(*args: Any, **kwargs: Any) -> Any:
        made = batches(*args, **kwargs)
        for batch in made:
            for context, row, ids in zip(batch.contexts, batch.rows, batch.input_ids, strict=True):
                seen[context, row] = int((ids == IDS["<|image_pad|>"]).sum())
            assert bool(batch.fields) == any(seen[key] for key in zip(batch.contexts, batch.rows, strict=True))
        return made

    trainer.purification_collator.scoring_batches = spy  # type: ignore[method-assign]
    one_step(trainer, [trainer.train_dataset[i] for i in range(4)])
    assert {row: seen["base", row] for row in range(4)} == {row: seen["teacher", row] for row in range(4)}
    assert [seen["base", row] for row in range(4)] == [4, 0, 6 + 6, 9]  # pixels of a token: 8 x 8
    assert not any(seen["reference_only", row] for row in range(4))


def test_a_batch_without_any_image_trains_as_text(build: Build) -> None:
    rows = [{**row, "images": []} for row in mixed_rows()]
    trainer = build("qwen2_5_vl", rows=rows)
    move_student(trainer)
    fixed_rollout(trainer)
    expected = by_hand(
        trainer, build_vlm("qwen2_5_vl"), [hand_messages(row) for row in rows], completions_for(trainer, rows)
    )
    assert_one_step(trainer, rows, *expected)


@pytest.mark.parametrize("shows", [True, False], ids=["image", "text"])
def test_a_tool_that_returns_an_image_or_text(build: Build, shows: bool) -> None:
    def look() -> Any:
        """
        Looks.

        Returns:
            The picture.
        """
        return [{"type": "image", "image": picture(50, 24, 24)}, {"type": "text", "text": "seen"}] if shows else "seen"

    trainer = build("qwen3_vl", max_completion_length=400, tools=[look])
    images = trainer.processing_class.image_processor
    images.preprocess = partial(images.preprocess, return_tensors="pt")  # as those of torchvision do, and TRL expects
    move_student(trainer)
    call = [IDS["<tool_call>"], *b'\n{"name": "look", "arguments": {}}\n', IDS["</tool_call>"], 260]
    turns = iter([[call, [*b"no", 260], [*b"none", 260], call], [[*b"done", 260], [*b"there", 260]]])
    trainer._generate_single_turn = lambda *_, **__: next(turns)  # type: ignore[method-assign]
    kept: dict[str, Any] = {}
    generate = trainer._generate

    def spy(prompts: list[Any]) -> Any:
        kept["out"] = generate(prompts)
        return kept["out"]

    trainer._generate = spy  # type: ignore[method-assign]
    rows = [trainer.train_dataset[i] for i in range(4)]
    loss = one_step(trainer, rows)
    own = {n: p.grad for n, p in trainer.model.named_parameters() if p.grad is not None}
    prompt_ids, completions, tool_mask, _, tool_images = kept["out"]
    tool_images = tool_images or [[] for _ in rows]
    assert [len(images) for images in tool_images] == [shows, 0, 0, shows]
    assert [completion.count(IDS["<|image_pad|>"]) for completion in completions] == [9 * shows, 0, 0, 9 * shows]
    assert [0 in mask for mask in tool_mask] == [True, False, False, True]  # the tool's result is there, without loss
    # The prompts describe the tool, so they are taken as they were, and the templates' text is checked elsewhere
    contexts = trainer.reader.contexts(rows, "")
    described = copy.copy(trainer.processing_class)
    described.apply_chat_template = lambda *args, **kwargs: type(described).apply_chat_template(
        trainer.processing_class, *args, tools=[look], **kwargs
    )
    trainer.processing_class, original = described, trainer.processing_class
    prompts = [{c: _parts(getattr(context, c)) for c in ("base", "teacher", "reference_only")} for context in contexts]
    expected, grads = by_hand(trainer, build_vlm("qwen3_vl"), prompts, completions, tool_mask, tool_images)
    trainer.processing_class = original
    assert loss == pytest.approx(expected, rel=1e-5)
    scale = max(grad.abs().max().item() for grad in grads.values())
    for name in grads:
        torch.testing.assert_close(own[name].double(), grads[name], rtol=1e-3, atol=1e-5 * scale, msg=name)


def _parts(prompt: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        {**m, "content": [{"type": "text", "text": m["content"]}] if isinstance(m["content"], str) else m["content"]}
        for m in prompt
    ]


def test_resuming_continues_where_training_stopped(build: Build, tmp_path: Path) -> None:
    fields = {"max_steps": 3, "save_strategy": "steps", "save_steps": 1, "per_device_train_batch_size": 2}
    whole = build("qwen3_vl", True, output_dir=str(tmp_path / "whole"), **fields)
    whole.train()
    resumed = build("qwen3_vl", True, output_dir=str(tmp_path / "whole"), **fields)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    for name, parameter in whole.model.named_parameters():
        assert torch.equal(parameter, resumed.model.get_parameter(name)), name
    assert (tmp_path / "whole" / "checkpoint-3" / "processor_config.json").is_file()


def test_images_do_not_go_to_servers_that_hold_adapters() -> None:
    fields: dict[str, Any] = {"use_vllm": True, "vllm_mode": "server", "vllm_adapter_sync": True, "use_cpu": True}
    trainer: Any = SimpleNamespace(args=PurifiedOPSDConfig("unused", bf16=False, **fields))
    with pytest.raises(InputError, match="`vllm_adapter_sync` serves text alone, but rows hold images"):
        ServedTrainer._generate_single_turn(trainer, [[1]], [[picture(0)]], {})


# Contexts ------------------------------------------------------------------------------------------------------------


def contexts_of(row: dict[str, Any], **templates: str) -> Any:
    return build_contexts(
        row,
        reference_column="reference",
        teacher_prompt_template=templates.get("teacher", DEFAULT_TEACHER_PROMPT_TEMPLATE),
        reference_prompt_template=templates.get("probe", DEFAULT_REFERENCE_PROMPT_TEMPLATE),
    )


def test_images_stay_where_the_question_has_them() -> None:
    content = [{"type": "text", "text": "A"}, {"type": "image", "text": None}, {"type": "text", "text": "B"}]
    row = {"prompt": [{"role": "user", "content": content}], "reference": "R", "image": "a.png"}
    contexts = contexts_of(row, teacher="<{question}|{reference}>", probe="{images}{reference}")
    image = {"type": "image", "image": "a.png"}
    text = [{"type": "text", "text": t} for t in ("A", "B", "<A", "B|R>", "R")]
    assert contexts.base == [{"role": "user", "content": [text[0], image, text[1]]}]
    assert contexts.teacher == [{"role": "user", "content": [text[2], image, text[3]]}]
    assert contexts.reference_only == [{"role": "user", "content": [image, text[4]]}]
    assert contexts_of(row).reference_only[0]["content"].startswith("Worked solution")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"images": [1], "image": 2}, "columns `image` and `images` both hold images"),
        ({"images": "a.png"}, "column `images`: a list of images is needed, got str"),
        ({"prompt": "text", "image": "a.png"}, "a prompt with images must be a list of messages"),
        (
            {"prompt": [{"role": "user", "content": [{"type": "image"}, {"type": "image"}]}], "image": "a.png"},
            "room for 2 images (parts of type image), but the row has 1",
        ),
        (
            {"prompt": [{"role": "user", "content": [{"type": "image"}, {"type": "video"}]}]},
            "column `prompt`: only text and images can be distilled, but a message holds parts of type video",
        ),
        (
            {"reference": [{"role": "assistant", "content": [{"type": "image"}]}]},
            "column `reference`: only text can be",
        ),
    ],
)
def test_rows_that_cannot_be_arranged(changed: dict[str, Any], message: str) -> None:
    row = {"prompt": [{"role": "user", "content": "q"}], "reference": "r", **changed}
    with pytest.raises(InputError) as error:
        contexts_of(row)
    assert message in str(error.value)


# Rows ----------------------------------------------------------------------------------------------------------------


def reader(processor: Any, **limits: Any) -> RowReader:
    return RowReader(processor, contexts_of, "reference", **limits)


def reason(row: dict[str, Any], processor: Any = None, **limits: Any) -> str | None:
    fault = reader(processor or build_processor("qwen3_vl"), **limits).faults([row])[0]
    return None if fault is None else fault.reason


def test_images_may_be_opened_encoded_or_named(tmp_path: Path) -> None:
    image = picture(3, 24, 16)
    image.save(tmp_path / "a.png")
    data = io.BytesIO()
    image.save(data, "png")
    stored = {"bytes": data.getvalue(), "path": None}
    processor, rows = build_processor("qwen3_vl"), image_rows(1)
    expected = encode(processor, hand_messages({**rows[0], "images": [image]})["base"])
    for value in (image, str(tmp_path / "a.png"), tmp_path / "a.png", data.getvalue(), stored):
        (contexts,) = reader(processor).contexts([{**rows[0], "image": value}], "")
        ids, fields = encode(processor, contexts.base)
        assert ids == expected[0] and all(torch.equal(fields[name], expected[1][name]) for name in fields)


def test_a_wrong_reference_is_read_with_the_image() -> None:
    def build(row: Any) -> Any:
        templates = (DEFAULT_TEACHER_PROMPT_TEMPLATE, DEFAULT_REFERENCE_PROMPT_TEMPLATE)
        names = ("teacher_prompt_template", "reference_prompt_template")
        kwargs = dict(zip(names, templates, strict=True))
        return build_contexts(row, reference_column="reference", wrong_reference_column="other", **kwargs)

    row = {**image_rows(1)[0], "other": "It is 5 degrees."}
    (contexts,) = RowReader(build_processor("qwen3_vl"), build, "reference").contexts([row], "")
    assert images_of(contexts.wrong) == images_of(contexts.teacher) == [row["image"]]
    assert "It is 5 degrees." in contexts.wrong[0]["content"][-1]["text"]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("no/such.png", "column `image`: an image cannot be read (no/such.png:"),
        (b"not an image", "column `image`: an image cannot be read (its bytes:"),
        ("https://host/a.png", "is an address. Nothing is downloaded"),
        (3, "an image must be a PIL image, a path, or the bytes of a file, got int"),
    ],
)
def test_images_that_cannot_be_read(value: Any, message: str) -> None:
    assert message in (reason({**image_rows(1)[0], "image": value}) or "")


def test_a_text_model_refuses_images(tokenizer: AutoTokenizer, arguments: dict[str, Any], make_model: Any) -> None:
    assert "column `image` holds images, but the model reads text alone" in (reason(image_rows(1)[0], tokenizer) or "")
    with pytest.raises(
        InputError, match="^train_dataset: column `image` holds images, but the model reads text alone"
    ):
        PurifiedOPSDTrainer(
            model=make_model(),
            args=PurifiedOPSDConfig(**arguments),
            train_dataset=Dataset.from_list(image_rows(4)),
            processing_class=tokenizer,
        )


def test_a_placeholder_in_the_text_is_refused() -> None:
    row = {**image_rows(1)[0], "prompt": [{"role": "user", "content": "<|image_pad|> What?"}]}
    assert "the text holds the special token '<|image_pad|>'" in (reason(row) or "")


@family
def test_expanded_placeholders_count(name: str) -> None:
    processor = build_processor(name)
    for size in ((16, 16), (48, 16), (20, 70)):
        row = {**image_rows(1)[0], "image": picture(1, *size)}
        prompt = hand_messages({**row, "images": [row["image"]]})
        length = len(encode(processor, prompt["teacher"])[0])
        text = len(encode(processor, hand_messages({**row, "images": None})["teacher"])[0])
        bound = token_bound(processor, [row["image"]])
        assert bound is not None and length - text <= bound
        assert reason(row, processor, max_prompt_length=length) is None
        assert "too long by 2 tokens" in (reason(row, processor, max_prompt_length=length - 2) or "")
        assert reader(processor).longest_base([row]) == len(encode(processor, prompt["base"])[0])


@pytest.mark.parametrize("column", ["image", "images"])
def test_the_check_of_a_dataset_decodes_no_pixels(column: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = image_rows(4) if column == "image" else mixed_rows()
    dataset = Dataset.from_list(rows)
    monkeypatch.setattr(Image, "decode_example", lambda *_, **__: pytest.fail("decoded"))
    ((_, read),) = row_blocks(dataset)
    assert reader(build_processor("qwen3_vl"), max_prompt_length=2000).faults(read) == [None] * 4


# Scoring batches -----------------------------------------------------------------------------------------------------


def test_processes_run_as_many_batches_with_images_and_without() -> None:
    collator = PurificationCollator(pad_token_id=0, max_sequences=2)
    prompts = {"base": [[1, 2], [1, 2, 3], [4]], "reference_only": [[5], [6], [7]]}
    image = {"pixel_values": torch.ones(1, 3), "mm_token_type_ids": torch.ones(1, 3, dtype=torch.long)}
    other = {**image, "pixel_values": torch.ones(1, 4)}
    fields = {"base": [image, {**image, "mm_token_type_ids": torch.ones(1, 4, dtype=torch.long)}, other]}
    asked: list[int] = []

    def agree(own: int) -> int:
        asked.append(own)
        return own + 1

    batches = collator.scoring_batches(prompts, [[8], [8], [8]], agree=agree, fields=fields)
    assert asked == [2, 2]  # two layouts with images; two batches of text
    assert [bool(batch.fields) for batch in batches] == [True] * 3 + [False] * 3
    assert {key for batch in batches for key in zip(batch.contexts, batch.rows, strict=True)} == {
        (context, row) for context in prompts for row in range(3)
    }
    for batch in batches[:3]:
        assert batch.fields["mm_token_type_ids"].shape == batch.input_ids.shape
        assert len(batch.fields["pixel_values"]) == len(batch.rows)


def test_images_of_text_prompts_and_messages() -> None:
    assert images_of("text") == [] and images_of([{"role": "user", "content": "text"}]) == []
