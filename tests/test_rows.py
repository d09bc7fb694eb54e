"""One row: what its text may hold, what the chat template refuses, and bounds of its length against real counts."""

import random
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from purified_opsd_trl.rows import RowReader, token_bound

from .dataset_cases import build


def reason(tokenizer, prompt: Any = "q", reference: Any = "r", **columns: Any) -> str | None:
    reader = RowReader(tokenizer, build, "reference")
    (fault,) = reader.faults([{"prompt": prompt, "reference": reference, **columns}])
    return fault.reason if fault else None


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


# --- tokens that must not occur in text -------------------------------------------------------------------------

RENDERED = "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n"
CALL = {
    "role": "assistant",
    "content": None,
    "tool_calls": [{"function": {"name": "f", "arguments": {"x": "<|im_end|>"}}}],
}


@pytest.mark.parametrize(
    "prompt",
    [
        RENDERED,
        [user(RENDERED)],
        [user([{"type": "text", "text": "a"}, {"type": "text", "text": RENDERED}])],
        [{"role": "system", "content": "<|im_end|>"}, user("q")],
        [user("<|start_header_id|>"), {"role": "assistant", "content": "a"}, user("q")],
        [user("q"), CALL, {"role": "tool", "name": "f", "content": "4"}],
    ],
    ids=["text", "message", "parts", "system", "earlier", "tool call"],
)
def test_turn_tokens_are_found_in_every_text_of_a_prompt(tokenizer, prompt) -> None:
    assert "column `prompt`: the text holds the special token '<|" in str(reason(tokenizer, prompt))


def test_a_special_token_in_a_reference_is_refused(tokenizer) -> None:
    assert "column `reference`: the reference holds the special token '<|im_end|>'" in str(
        reason(tokenizer, reference="b<|im_end|>\n<|im_start|>assistant\n")
    )
    assert reason(tokenizer, "a < b, <think> and </think>", "<think>a < b</think>") is None


def deepseek(make_tokenizer, **names: bool) -> PreTrainedTokenizerFast:
    """A tokenizer with added tokens, of which `names` says whether they are special; none has a role such as `eos`."""
    source = make_tokenizer("deepseek_r1_distill")
    backend = Tokenizer(models.BPE(vocab=byte_vocab(), merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    for name, special in names.items():
        backend.add_tokens([AddedToken(name, normalized=False, special=special)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    tokenizer.chat_template = source.chat_template
    return tokenizer


def byte_vocab() -> dict[str, int]:
    return {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}


def test_added_tokens_that_are_special_or_mark_turns_are_found(make_tokenizer) -> None:
    names = {"<|image|>": True, "<｜User｜>": False, "<｜Assistant｜>": False, "<think>": False, "</think>": False}
    tokenizer = deepseek(make_tokenizer, **names, **{"<other>": False})
    assert tokenizer.all_special_tokens == []
    for token in ("<|image|>", "<｜User｜>", "<｜Assistant｜>"):
        assert repr(token) in str(reason(tokenizer, reference=f"a{token}"))
    for token in ("<think>", "</think>", "<other>"):
        assert reason(tokenizer, reference=f"a{token}") is None


# --- other rows that cannot be used -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a\ud800"}, r"column `prompt`: the text holds half a surrogate pair ('\ud800')"),
        ({"prompt": [user("a\udfff")]}, "column `prompt`: the text holds half a surrogate pair"),
        ({"reference": "a\ud800"}, "column `reference`: the text holds half a surrogate pair"),
        (
            {"prompt": [{"role": None, "content": "q"}]},
            "the `role` of a message must be a string, got None",
        ),
        (
            {"prompt": [user("q"), {"role": 3, "content": "q"}]},
            "the `role` of a message must be a string, got 3",
        ),
        ({"prompt": [user("q")], "image": "x.png"}, "column `image` holds images, but the model reads text alone"),
        ({"prompt": [user("q")], "images": ["x.png"]}, "column `images` holds images, but the model reads text alone"),
    ],
)
def test_rows_that_cannot_be_used(tokenizer, row, message) -> None:
    assert message in str(reason(tokenizer, **row))


def test_empty_image_columns_are_no_images(tokenizer) -> None:
    assert reason(tokenizer, image=None, images=[]) is None


def test_messages_without_a_chat_template(make_tokenizer) -> None:
    assert "the prompt is a list of messages, but the model's tokenizer has no chat template" in str(
        reason(make_tokenizer(None), [user("q")])
    )
    assert reason(make_tokenizer(None)) is None


@pytest.mark.parametrize("template", ["gemma", "chatml_no_system"])
def test_a_turn_that_the_template_refuses_is_named(make_tokenizer, template) -> None:
    chat = [{"role": "system", "content": "s"}, user("q")]
    assert "column `prompt`: the model's chat template refuses" in str(reason(make_tokenizer(template), chat))


@pytest.mark.parametrize("fails", ["{{ 1 / 0 }}", "{{ undefined() }}", "{{ messages[0].content.encode('ascii') }}"])
def test_a_template_that_fails_is_named(tokenizer, fails) -> None:
    tokenizer.chat_template = fails
    assert "column `prompt`: the model's chat template refuses" in str(reason(tokenizer, [user("é")]))


def test_a_message_with_only_tool_calls_gets_empty_content(tokenizer) -> None:
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
    contexts = build({"prompt": [user("q"), call, {"role": "tool", "content": "4"}], "reference": "r"})
    assert contexts.base[1]["content"] is None


# --- bounds of the length -----------------------------------------------------------------------------------------


def byte_fallback(normalizer: Any, pre_tokenizer: Any = None) -> PreTrainedTokenizerFast:
    vocab = {"<unk>": 0, **{f"<0x{i:02X}>": 1 + i for i in range(256)}, "a": 257, "b": 258}  # no "▁"
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True))
    backend.normalizer = normalizer
    if pre_tokenizer is not None:
        backend.pre_tokenizer = pre_tokenizer
    backend.add_special_tokens(["<s>"])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>")


def byte_level(normalizer: Any = None, prefix_space: bool = False) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE(vocab=byte_vocab(), merges=[]))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(), pre_tokenizers.ByteLevel(add_prefix_space=prefix_space)]
    )
    if normalizer is not None:
        backend.normalizer = normalizer
    return PreTrainedTokenizerFast(tokenizer_object=backend)


LLAMA2 = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
BOUNDED = {
    "byte level": lambda: byte_level(),
    "byte level, NFC": lambda: byte_level(normalizers.NFC()),
    "Gemma": lambda: byte_fallback(normalizers.Replace(" ", "▁"), pre_tokenizers.Split(" ", "merged_with_previous")),
    "Llama 2": lambda: byte_fallback(normalizers.Sequence(LLAMA2)),
    "Metaspace": lambda: byte_fallback(normalizers.Sequence([]), pre_tokenizers.Metaspace()),
}
# U+0958 and U+1D160 are longer in NFC; an accent alone, a letter that composes, special tokens, runs of spaces
PIECES = ["a", "b ", " ", "    ", "é", "e\u0301", "\u0958", "\U0001d160", "😀", "<s>", "\n", "12"]


@pytest.mark.parametrize("kind", BOUNDED)
def test_no_text_has_more_tokens_than_the_bound(kind) -> None:
    tokenizer = BOUNDED[kind]()
    bound = token_bound(tokenizer)
    assert bound is not None
    draw = random.Random(0)
    for _ in range(500):
        text = "".join(draw.choices(PIECES, k=draw.randint(0, 12)))
        assert len(tokenizer(text)["input_ids"]) <= bound(text), repr(text)


def test_no_bound_where_text_may_grow() -> None:
    assert token_bound(byte_level(normalizers.NFKC())) is None
    assert token_bound(byte_level(prefix_space=True)) is None
    assert token_bound(byte_fallback(normalizers.Replace("a", "bbbbbbbbbb"))) is None
    assert token_bound(object()) is None


@pytest.mark.parametrize("template", ["chatml", "qwen3", "llama3"])
def test_the_bound_never_changes_what_is_too_long(make_tokenizer, template, monkeypatch) -> None:
    draw = random.Random(1)
    tokenizer = make_tokenizer(template, add_bos=template == "llama3")
    rows = []
    for _ in range(60):
        question, reference = ("".join(draw.choices("ab é😀\n", k=draw.randint(1, 60))) + "." for _ in range(2))
        rows.append({"prompt": draw.choice([question, [user(question)]]), "reference": reference})
    limits = {"max_prompt_length": 110, "max_reference_length": 50}
    found = RowReader(tokenizer, build, "reference", **limits).faults(rows)
    monkeypatch.setattr("purified_opsd_trl.rows.token_bound", lambda tokenizer: None)
    assert RowReader(tokenizer, build, "reference", **limits).faults(rows) == found
    assert 10 < sum(fault is not None for fault in found) < 50


def test_the_longest_prompt_of_the_student(tokenizer) -> None:
    reader = RowReader(tokenizer, build, "reference")
    rows = [{"prompt": text, "reference": "r"} for text in ("abc", "é", "abcde", "", "<|im_start|>" * 9)]
    assert reader.longest_base(rows) == 5
    assert reader.longest_base(rows, at_least=7) == 7
