"""
The one way in which a row is read: row -> checked contexts, or the reason why not.

```text
row             -> contexts   `build_contexts`: base, teacher, reference_only
row, contexts   -> usable?    format, special tokens, images, what the chat template refuses
contexts        -> fits?      tokens beyond the limits; tokenized only if the text's bytes could exceed them
dataset, stream -> the rows that are left, before training or as they arrive (`dataset.py`)
step's rows     -> contexts   references truncated where they do not fit
```
"""

import hashlib
import inspect
import json
import re
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

from transformers import PreTrainedTokenizerBase
from trl.data_utils import prepare_multimodal_messages

from . import contexts as contexts_module
from . import images, multimodal
from .contexts import Contexts, Prompt, reference_text
from .errors import InputError, one_line
from .images import images_of, open_images
from .multimodal import encode


Row: TypeAlias = Mapping[str, Any]
# Text, whether special tokens are added to it, most tokens, and the prompt that was rendered if it holds images
_Measured: TypeAlias = tuple[str, bool, int, Prompt | None]


@dataclass(frozen=True)
class Fault:
    """Why a row cannot be used as it is: not at all, or (`excess` above 0) because its reference is too long."""

    reason: str
    excess: int = 0  # tokens


def turn_tokens(tokenizer: PreTrainedTokenizerBase, chat_template: str | None) -> set[str]:
    """
    Tokens that must not occur in text: special ones, and those with which the chat template marks turns.

    Some families mark turns with added tokens that are not special (`<｜User｜>`). Other added tokens are text
    (`<think>`), among them all that are opened and closed like XML tags.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer of the student.
        chat_template (`str`, *optional*):
            The template.

    Returns:
        `set[str]`: the tokens' texts.
    """
    added = tokenizer.added_tokens_decoder.values()
    special = {token.content for token in added if token.special} | set(tokenizer.all_special_tokens)
    plain = {token.content for token in added if not token.special}
    turns = [{"role": role, "content": "."} for role in ("user", "assistant", "user")]
    try:
        frame = (
            tokenizer.apply_chat_template(turns, chat_template=chat_template, tokenize=False) if chat_template else ""
        )
    except Exception:  # e.g. a template that wants tools; a template is a program and may raise anything
        frame = ""
    tags = {token for token in plain if re.sub("^</?", "</", token) in plain and re.sub("^</?", "<", token) in plain}
    return {token for token in special | {t for t in plain - tags if t in frame} if token.strip()}


def token_bound(tokenizer: PreTrainedTokenizerBase) -> Callable[[str], int] | None:
    """
    An upper bound of a text's number of tokens that is far cheaper than counting them.

    Byte-level BPE makes at most one token per UTF-8 byte of the normalized text. With byte fallback a space may become
    the three bytes of `▁`, and one more is put before each piece between added tokens.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer of the student.

    Returns:
        `Callable[[str], int]`, *optional*: text to most tokens; `None` if nothing is known of the tokenizer.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    extra = backend.num_special_tokens_to_add(False)
    normalizers = _parts(backend.normalizer, "normalizers")
    pre_tokenizers = _parts(backend.pre_tokenizer, "pretokenizers")
    kinds = {part["type"] for part in normalizers}
    byte_level = [part for part in pre_tokenizers if part["type"] == "ByteLevel"]
    if byte_level and kinds <= {"NFC"} and not any(part["add_prefix_space"] for part in byte_level):

        def bytes_of(text: str) -> int:
            if kinds and not text.isascii():  # composing can lengthen a text (U+0958 becomes two characters)
                text = unicodedata.normalize("NFC", text) if not unicodedata.is_normalized("NFC", text) else text
            return len(text.encode()) + extra

        return bytes_of
    fallback = getattr(backend.model, "byte_fallback", False)
    replaces = all(part.get("content", "▁") == "▁" for part in normalizers)
    if fallback and kinds <= {"Replace", "Prepend"} and replaces:
        if {part["type"] for part in pre_tokenizers} <= {"Split", "Metaspace"}:
            return lambda text: 6 * len(text.encode()) + 3 + extra
    return None


def _parts(component: Any, key: str) -> list[dict[str, Any]]:
    """Settings of a normalizer or pre-tokenizer, or of each one in a sequence."""
    if component is None:
        return []
    state = json.loads(component.__getstate__())
    return state.get(key, [state])


class RowReader:
    """
    Reads rows: builds their contexts, says why one cannot be used, and shortens references that are too long.

    Args:
        processing_class ([`~transformers.PreTrainedTokenizerBase`] or [`~transformers.ProcessorMixin`]):
            Tokenizer of the student, or the processor that holds it.
        build_contexts (`Callable[[Mapping], Contexts]`):
            Row to contexts.
        reference_column (`str`):
            Name of the column that holds the worked solution.
        template_kwargs (`Mapping[str, Any]`, *optional*):
            Keyword arguments of `apply_chat_template` for the prompts that are measured.
        max_reference_length (`int`, *optional*):
            Longest reference in tokens.
        max_prompt_length (`int`, *optional*):
            Longest prompt with the reference in tokens: the model's context minus `max_completion_length`.
        truncate (`bool`, *optional*, defaults to `False`):
            Whether references that are too long are shortened.
    """

    def __init__(
        self,
        processing_class: Any,
        build_contexts: Callable[[Row], Contexts],
        reference_column: str,
        *,
        template_kwargs: Mapping[str, Any] | None = None,
        max_reference_length: int | None = None,
        max_prompt_length: int | None = None,
        truncate: bool = False,
    ):
        self.tokenizer: PreTrainedTokenizerBase = getattr(processing_class, "tokenizer", processing_class)
        self.chat_template = processing_class.chat_template or self.tokenizer.chat_template
        self.reference_column = reference_column
        self.max_reference_length = max_reference_length
        self.max_prompt_length = max_prompt_length
        self.truncate = truncate
        self._processing_class = processing_class
        self._build = build_contexts
        self._template_kwargs = dict(template_kwargs or {})
        self._bound = token_bound(self.tokenizer)
        tokens = sorted(turn_tokens(self.tokenizer, self.chat_template), key=len, reverse=True)
        self._turn_token = re.compile("|".join(map(re.escape, tokens)) or "(?!)")

    def contexts(self, rows: Sequence[Row], where: str) -> list[Contexts]:
        """
        Contexts of rows that have been checked, with shorter references where that was asked for.

        Args:
            rows (`Sequence[Mapping]`):
                Dataset rows.
            where (`str`):
                How errors name the rows' origin.

        Returns:
            `list[Contexts]`

        Raises:
            `InputError`: if a row cannot be used.
        """
        built = []
        for index, row in enumerate(rows):
            try:
                contexts = self._contexts(row)
                built.append(self._truncated(row, contexts) if self.truncate else contexts)
            except InputError as error:
                raise InputError(f"{where}, row {index}, {error}") from None
        return built

    def faults(self, rows: Sequence[Row]) -> list[Fault | None]:
        """
        Checks rows.

        Args:
            rows (`Sequence[Mapping]`):
                Dataset rows.

        Returns:
            `list[Fault | None]`: what is wrong with each row. With `truncate`, a reference that can be shortened is
            reported as well, as `excess`.
        """
        faults: list[Fault | None] = [None] * len(rows)
        built: dict[int, tuple[Contexts, list[_Measured]]] = {}
        for i, row in enumerate(rows):
            try:
                contexts = self._checked(row)
                built[i] = contexts, self._measured(contexts, self._reference(row))
            except InputError as error:
                faults[i] = Fault(str(error))
        excess = self._excess([texts for _, texts in built.values()])
        for (i, (contexts, _)), tokens in zip(built.items(), excess, strict=True):
            if tokens:
                faults[i] = self._overlong(rows[i], contexts, tokens)
        return faults

    def text(self, prompt: Prompt) -> str:
        """A prompt as the model sees it, chat template included."""
        return self._render(prompt)[0]

    def longest_base(self, rows: Sequence[Row], at_least: int = 0) -> int:
        """
        Tokens of the longest student's prompt, or `at_least` if none is longer; rows that cannot be used do not count.

        Args:
            rows (`Sequence[Mapping]`):
                Dataset rows.
            at_least (`int`, *optional*, defaults to `0`):
                Longest prompt so far, in tokens.

        Returns:
            `int`: tokens.
        """
        texts: list[list[_Measured]] = []
        for row in rows:
            try:
                base = self._checked(row).base
                texts.append([(*self._render(base), at_least, base if images_of(base) else None)])
            except InputError:
                continue
        return at_least + max(self._excess(texts), default=0)

    def fingerprint(self) -> str | None:
        """Hash of all that `faults` depends on beside the row; `None` where it cannot be taken."""
        if not self.tokenizer.is_fast:
            return None
        options = dict(self._template_kwargs)
        tools = [f"{tool!s}{inspect.getdoc(tool)}" for tool in options.pop("tools", None) or []]
        probe = self._build({"prompt": "{question}", self.reference_column: "{reference}"})
        limits = (self.reference_column, self.max_reference_length, self.max_prompt_length, self.truncate)
        files = (contexts_module.__file__, images.__file__, multimodal.__file__, __file__)
        code = [Path(file).read_text(encoding="utf-8") for file in files]
        vision = str(getattr(self._processing_class, "image_processor", None))
        backend = self.tokenizer.backend_tokenizer.to_str()
        state = (backend, vision, self.chat_template, options, tools, probe, limits, code)
        return hashlib.sha256(repr(state).encode()).hexdigest()

    # Checks ----------------------------------------------------------------------------------------------------------

    def _reference(self, row: Row) -> str:
        return reference_text(row[self.reference_column], self.reference_column)

    def _contexts(self, row: Row) -> Contexts:
        """Contexts of a row with opened images."""
        contexts = self._build(row)
        prompts = {name: prompt for name, prompt in vars(contexts).items() if prompt is not None}
        seen = any(map(images_of, prompts.values()))
        opened = open_images(list(prompts.values()), row, self._processing_class) if seen else prompts.values()
        return replace(contexts, **dict(zip(prompts, opened, strict=True)))

    def _checked(self, row: Row) -> Contexts:
        """Contexts of a row whose texts can be rendered and tokenized."""
        contexts = self._contexts(row)
        if not isinstance(contexts.base, str) and self.chat_template is None:
            raise InputError(
                "column `prompt`: the prompt is a list of messages, but the model's tokenizer has no chat template. "
                "Set `processing_class.chat_template`, take the instruction-tuned variant of the model, or give the "
                "prompts as text."
            )
        for text in _strings(row["prompt"]):
            if found := self._turn_token_in(text, "prompt"):
                raise InputError(
                    f"column `prompt`: the text holds the special token {found!r}, so a chat template seems to have "
                    "been applied already. Give the prompt as messages without such tokens in their text; the trainer "
                    "applies the template, which also places images, to each context on its own."
                )
        if found := self._turn_token_in(self._reference(row), self.reference_column):
            raise InputError(
                f"column `{self.reference_column}`: the reference holds the special token {found!r}, which would "
                "break out of the teacher's turn. Remove it from the text."
            )
        return contexts

    def _turn_token_in(self, text: str, column: str) -> str | None:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InputError(
                f"column `{column}`: the text holds half a surrogate pair ({text[error.start]!a}), which UTF-8 cannot "
                "encode. Remove the character, or repair the step that wrote it."
            ) from None
        match = self._turn_token.search(text)
        return match.group() if match else None

    # Length ----------------------------------------------------------------------------------------------------------

    def _render(self, prompt: Prompt) -> tuple[str, bool]:
        """A prompt as text, and whether the tokenizer then adds special tokens of its own."""
        if isinstance(prompt, str):
            return prompt, True
        if self._processing_class is not self.tokenizer:
            prompt = prepare_multimodal_messages(prompt)  # as TRL's rollout does
        try:
            text = self._processing_class.apply_chat_template(
                prompt, add_generation_prompt=True, tokenize=False, **self._template_kwargs
            )
        except Exception as error:  # a template is a program and may raise anything
            raise InputError(
                f"column `prompt`: the model's chat template refuses these messages ({one_line(error)}). Many "
                "templates know no system turn, or want user and assistant to alternate."
            ) from error
        return str(text), False

    def _measured(self, contexts: Contexts, reference: str) -> list[_Measured]:
        """The texts of a row whose length is limited; both prompts are rendered, as the template may refuse them."""
        privileged = (contexts.teacher, contexts.reference_only, contexts.wrong)
        limit, reference_limit = self.max_prompt_length, self.max_reference_length
        prompts = [prompt for prompt in privileged if prompt is not None]
        rendered = [(*self._render(p), limit or 0, p if images_of(p) else None) for p in prompts]
        texts = [] if limit is None else rendered
        return texts if reference_limit is None else [*texts, (reference, False, reference_limit, None)]

    def _excess(self, rows: list[list[_Measured]]) -> list[int]:
        """Per row the tokens by which the worst of its texts is too long; 0 if all fit."""
        excess = [0] * len(rows)
        for kind in (True, False):
            counted = [
                (i, text, limit)
                for i, row in enumerate(rows)
                for text, special, limit, prompt in row
                if special is kind and prompt is None and (self._bound is None or self._bound(text) > limit)
            ]
            if counted:
                ids = self.tokenizer(text=[text for _, text, _ in counted], add_special_tokens=kind)["input_ids"]
                for (i, _, limit), row_ids in zip(counted, ids, strict=True):
                    excess[i] = max(excess[i], len(row_ids) - limit)
        with_images = [(i, *measured) for i, row in enumerate(rows) for measured in row if measured[3]]
        for i, text, _, limit, prompt in with_images:
            bound = images.token_bound(self._processing_class, images_of(prompt))
            if bound is None or self._bound is None or self._bound(text) + bound > limit:
                own = encode(self._processing_class, prompt, **self._template_kwargs)[0]
                excess[i] = max(excess[i], len(own) - limit)
        return excess

    def _overlong(self, row: Row, contexts: Contexts, excess: int) -> Fault:
        column = self.reference_column
        if self.truncate:
            try:
                self._truncated(row, contexts)
            except InputError as error:
                return Fault(str(error))
        return Fault(f"column `{column}`: the reference is too long by {excess} tokens", excess)

    def _truncated(self, row: Row, contexts: Contexts) -> Contexts:
        """Contexts with as many first tokens of the reference as fit."""
        reference = self._reference(row)
        while excess := self._excess([self._measured(contexts, reference)])[0]:
            # Retokenized text can be a token longer or shorter at the cut, hence the loop
            reference = self._without_last_tokens(reference, excess)
            if not reference.strip():
                raise InputError(
                    f"column `{self.reference_column}`: the question leaves no room for a reference (limit "
                    f"{self.max_prompt_length} prompt tokens, {self.max_reference_length} reference tokens). Lower "
                    "`max_completion_length` or leave the row out."
                )
            value = row[self.reference_column]
            shorter = reference if isinstance(value, str) else [{**value[0], "content": reference}]
            contexts = self._contexts({**row, self.reference_column: shorter})
        return contexts

    def _without_last_tokens(self, text: str, count: int) -> str:
        if not self.tokenizer.is_fast:  # no offsets: decode, less what a cut inside a character leaves
            ids = self.tokenizer(text=text, add_special_tokens=False)["input_ids"]
            return str(self.tokenizer.decode(ids[: max(0, len(ids) - count)])).rstrip("\ufffd")[: len(text) - 1]
        offsets = self.tokenizer(text=text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        return text[: offsets[-count][0]] if count < len(offsets) else ""


def _strings(value: Any) -> Iterator[str]:
    """Every text in a prompt, down to the arguments of tool calls."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _strings(item)
    elif isinstance(value, Sequence) and not isinstance(value, bytes):
        for item in value:
            yield from _strings(item)
