"""
Dataset row -> the prompts that one completion is scored under.

```text
base            the question as the student sees it           student pi_theta, base P_0
teacher         question and reference in the last user turn  privileged teacher pi_T
reference_only  reference, no question-bearing turn           reference-only probe pi_ref
wrong           question and another reference                only for `target: contrastive`
```
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

from .errors import InputError
from .images import images_of, place_images, row_images


Prompt: TypeAlias = str | list[dict[str, Any]]

Content: TypeAlias = str | list[dict[str, Any]]  # of a message: text, or parts where it holds images

_PLACEHOLDER = re.compile(r"\{(question|reference|images)\}")


@dataclass(frozen=True)
class Contexts:
    """
    The three prompts of one row, in the dataset's own format (text, or a list of messages).

    Attributes:
        base (`str` or `list[dict]`):
            The prompt of the student and of the base; contents are text, or parts where they hold images. Holds no
            text of the reference.
        teacher (`str` or `list[dict]`):
            The privileged teacher's prompt: question and reference.
        reference_only (`str` or `list[dict]`):
            The reference-only probe's prompt: the reference without the question and its images.
        wrong (`str` or `list[dict]`, *optional*):
            The teacher's prompt with a wrong reference.
    """

    base: Prompt
    teacher: Prompt
    reference_only: Prompt
    wrong: Prompt | None = None


def fill_template(template: str, **values: str) -> str:
    r"""
    Replaces `{question}` and `{reference}` in one pass.

    Unlike `str.format`, every other brace is literal (`\boxed{}` needs no escaping), and a placeholder that occurs in
    the data is not filled again.

    Args:
        template (`str`):
            Text with placeholders.
        values (`str`):
            Text for each placeholder that occurs.

    Returns:
        `str`: the filled template.
    """
    return _PLACEHOLDER.sub(lambda match: values.get(match.group(1), match.group()), template)


def fill_parts(template: str, **values: Content) -> Content:
    """Fills a template with texts or lists of parts: text if nothing but text comes in, otherwise a list of parts."""
    pieces = _PLACEHOLDER.split(template)  # text, placeholder, text, ...
    filled = [values.get(piece, f"{{{piece}}}") if i % 2 else piece for i, piece in enumerate(pieces)]
    parts: list[dict[str, Any]] = []
    for value in filled:
        for part in [{"type": "text", "text": value}] if isinstance(value, str) else value:
            if part["type"] == "text" and parts and parts[-1]["type"] == "text":
                parts[-1] = {"type": "text", "text": parts[-1]["text"] + part["text"]}
            else:
                parts.append(part)
    parts = [part for part in parts if part.get("text") != ""]
    return "".join(p["text"] for p in parts) if all(p["type"] == "text" for p in parts) else parts


def content_parts(content: Any, column: str) -> Content:
    """A message's content as text; as parts of type text and image, without empty keys, if it holds images."""
    is_list = isinstance(content, Sequence) and all(isinstance(part, Mapping) for part in content)
    if not is_list or not any(part.get("type") == "image" for part in content):
        return content_text(content, column)
    return [
        {k: v for k, v in part.items() if v is not None}
        if part.get("type") == "image"
        else {"type": "text", "text": content_text([part], column)}
        for part in content
    ]


def content_text(content: Any, column: str) -> str:
    """
    Text of a message's content, which is a string or a list of `{"type": "text"}` parts.

    Args:
        content (`str` or `list[dict]` or `None`):
            The message's content.
        column (`str`):
            Column the value comes from, for the error.

    Returns:
        `str`: the text; parts are joined without a separator.

    Raises:
        `InputError`: for parts that are not text, or another type.
    """
    if isinstance(content, str):
        return content
    if content is None:
        return ""
    if isinstance(content, Sequence) and all(isinstance(part, Mapping) for part in content):
        others = {str(part.get("type")) for part in content} - {"text"}
        if others:
            raise InputError(
                f"column `{column}`: only text{' and images' if column == 'prompt' else ''} can be distilled, but a "
                f"message holds parts of type {', '.join(sorted(others))}. Remove these rows or parts."
            )
        if all(isinstance(part.get("text"), str) for part in content):
            return "".join(part["text"] for part in content)
        raise InputError(f"column `{column}`: a part of type text must hold a string under `text`.")
    raise InputError(
        f"column `{column}`: message content must be a string or a list of parts, got {type(content).__name__}."
    )


def reference_text(reference: Any, column: str) -> str:
    """
    The worked solution as text.

    Args:
        reference (`str` or `list[dict]`):
            A string, or messages whose contents are joined by an empty line.
        column (`str`):
            Column the value comes from, for the error.

    Returns:
        `str`: non-empty text.

    Raises:
        `InputError`: if the reference is missing, `None`, empty, blank, or of another type.
    """
    if isinstance(reference, str):
        text = reference
    elif isinstance(reference, Sequence) and all(isinstance(m, Mapping) and "content" in m for m in reference):
        text = "\n\n".join(filter(None, (content_text(m["content"], column) for m in reference)))
    elif reference is None:
        raise InputError(
            f"column `{column}`: the reference is None. Every row needs a worked solution; filter such rows out."
        )
    else:
        raise InputError(
            f"column `{column}`: a reference must be a string or a list of messages, got {type(reference).__name__}."
        )
    if not text.strip():
        raise InputError(
            f"column `{column}`: the reference is empty. Every row needs a worked solution; filter such rows out."
        )
    return text


def build_contexts(
    row: Mapping[str, Any],
    *,
    reference_column: str,
    teacher_prompt_template: str,
    reference_prompt_template: str,
    wrong_reference_column: str | None = None,
    without_reference: bool = False,
) -> Contexts:
    """
    Builds the three prompts of one row.

    Conversational prompts: system turns stay in all three. The teacher's last user turn becomes the teacher template
    filled with that turn and the reference; earlier turns stay. The reference-only prompt is the system turns and one
    user turn, the reference template: every other turn bears on the question and is dropped. Contents given as lists
    of text parts become text, since chat templates of text models render such lists differently, or not at all. Text
    prompts become the filled templates.

    Images belong to the question: base and teacher see them, in the teacher's turn where `{question}` stands. The
    reference-only prompt holds none, unless its template has the placeholder `{images}`.

    Args:
        row (`Mapping[str, Any]`):
            Dataset row with `"prompt"` and `reference_column`.
        reference_column (`str`):
            Name of the column that holds the worked solution.
        teacher_prompt_template (`str`):
            Template with `{question}` and `{reference}`.
        reference_prompt_template (`str`):
            Template with `{reference}`.
        wrong_reference_column (`str`, *optional*):
            Column of a wrong reference, for the fourth prompt.
        without_reference (`bool`, *optional*, defaults to `False`):
            Fill an empty reference into the templates.

    Returns:
        [`Contexts`]

    Raises:
        `InputError`: if the prompt or the reference cannot be used. The message names the column; the caller, who
            knows it, puts the row's number in front.
    """
    if reference_column not in row:
        raise InputError(
            f"no column `{reference_column}`; the row has {', '.join(f'`{c}`' for c in row)}. Set `reference_column` "
            "to the column that holds the worked solution."
        )
    if wrong_reference_column is not None:
        right, other = (
            build_contexts(
                row,
                reference_column=column,
                teacher_prompt_template=teacher_prompt_template,
                reference_prompt_template=reference_prompt_template,
            )
            for column in (reference_column, wrong_reference_column)
        )
        return replace(right, wrong=other.teacher)
    reference = reference_text(row[reference_column], reference_column)
    if without_reference:
        reference = ""
    prompt = row.get("prompt")
    images = row_images(row)
    if isinstance(prompt, str):
        if images:
            raise InputError("column `prompt`: a prompt with images must be a list of messages, not text.")
        if not prompt.strip():
            raise InputError("column `prompt`: the prompt is empty.")
        return Contexts(
            base=prompt,
            teacher=fill_template(teacher_prompt_template, question=prompt, reference=reference),
            reference_only=fill_template(reference_prompt_template, reference=reference, images=""),
        )
    return _conversation(
        place_images(_checked_messages(prompt), images), reference, teacher_prompt_template, reference_prompt_template
    )


def _conversation(
    messages: list[dict[str, Any]], reference: str, teacher_prompt_template: str, reference_prompt_template: str
) -> Contexts:
    """The three prompts of checked messages."""
    last_user = max(i for i, message in enumerate(messages) if message["role"] == "user")
    question = messages[last_user]["content"] or ""
    if isinstance(question, str) and not question.strip():
        raise InputError("column `prompt`: the last user turn is empty.")
    seen = [{"type": "image", "image": image} for image in images_of(messages)]
    teacher = list(messages)
    teacher[last_user] = {
        "role": "user",
        "content": fill_parts(teacher_prompt_template, question=question, reference=reference),
    }
    system = [message for message in messages if message["role"] in ("system", "developer")]
    return Contexts(
        base=messages,
        teacher=teacher,
        reference_only=[
            *system,
            {"role": "user", "content": fill_parts(reference_prompt_template, reference=reference, images=seen)},
        ],
    )


def _checked_messages(prompt: Any) -> list[dict[str, Any]]:
    def is_message(turn: Any) -> bool:
        return isinstance(turn, Mapping) and "role" in turn and ("content" in turn or "tool_calls" in turn)

    if not isinstance(prompt, Sequence) or not all(map(is_message, prompt)):
        kind = "None" if prompt is None else type(prompt).__name__
        raise InputError(
            f"column `prompt`: a prompt must be a string or a list of messages with `role` and `content`, got {kind}."
        )
    messages = [dict(message) for message in prompt]
    for message in messages:
        if not isinstance(message["role"], str):
            raise InputError(f"column `prompt`: the `role` of a message must be a string, got {message['role']!r}.")
        # None beside tool calls stays None, and must be there
        content = message.setdefault("content", None)
        if content is not None:
            message["content"] = content_parts(content, "prompt")
    roles = [message["role"] for message in messages]
    if "user" not in roles:
        raise InputError(f"column `prompt`: the prompt has no user turn (roles: {', '.join(roles) or 'none'}).")
    if roles[-1] == "assistant":
        raise InputError(
            "column `prompt`: the prompt ends in an assistant turn. The student writes that turn itself: end the "
            "prompt with a user turn and move the solution to the reference column."
        )
    return messages
