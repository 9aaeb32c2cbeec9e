"""A conversation as token ids: by the checkpoint's chat template, or as plain text where it has none."""

from __future__ import annotations

from collections.abc import Sequence

from llada_lightning.checkpoints import LanguageModel
from llada_lightning.data.chat import Message


def conversation_ids(lm: LanguageModel, messages: Sequence[Message]) -> list[int]:
    """The prompt that asks for the next answer.

    Args:
        lm: with a chat template, or without: then the messages are joined by new lines.
        messages: the last one is the user's.

    Raises:
        UserError: there is no tokenizer, or the template is broken or refuses the messages.
    """
    if lm.dialogue is None:
        return lm.encode_prompt("".join(f"{message.content}\n" for message in messages))
    return lm.dialogue.ids(messages)


def fitting_ids(lm: LanguageModel, messages: Sequence[Message], length: int) -> tuple[list[int], int]:
    """The prompt of the newest turns that leave room for an answer of ``length`` tokens, and how many were left out.

    A turn is a question and its answer. The system's message and the last question stay, also where they do not fit:
    the sampler refuses these.
    """
    system = [message for message in messages if message.role == "system"]
    said = [message for message in messages if message.role != "system"]
    left_out = 0
    while True:
        ids = conversation_ids(lm, system + said[2 * left_out :])
        if len(ids) + length <= lm.context_length or len(said) <= 2 * (left_out + 1):
            return ids, left_out
        left_out += 1
