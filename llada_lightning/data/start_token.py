"""The token before every sequence of a model, in the files of its tokenizer: so that other programs put it there.

An `arm` of ours is trained with EOS before every sequence. Our own programs put it there themselves, and a tokenizer of
ours adds nothing to a text. Other programs go by the tokenizer's files: its post-processor, ``add_bos_token`` with
``bos_token``, and the chat template, because no post-processor runs over a rendered dialogue. :func:`with_start_token`
writes the token into them, with what it replaces; :func:`without_start_token` gives back the files as they were.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

from llada_lightning.data import ROLES_NAME, TEMPLATE_NAME, TOKENIZER_CONFIG_NAME, TOKENIZER_NAME
from llada_lightning.support.errors import UserError
from llada_lightning.support.files import json_bytes
from llada_lightning.support.reading import parse_json

_KEY = "llada_lightning"
"""Our key in ``tokenizer_config.json``: what stood there before the token was written."""
_CHANGED = ("bos_token", "add_bos_token", "model_input_names")


def with_start_token(files: Mapping[str, bytes], token: str, token_id: int, bos_token: str) -> dict[str, bytes]:
    """The files of a tokenizer that puts a token before every text and every rendered dialogue.

    Args:
        files: The content of ``tokenizer.json``, ``tokenizer_config.json`` and the files beside them, by file name;
            they have been read before, so that they are whole.
        token: The token.
        token_id: The id of the token.
        bos_token: What ``bos_token`` means in the chat template as it is; it keeps that meaning.
    """
    text, written = files[TOKENIZER_NAME].decode(), dict(files)
    kept = [part for part in _parts(json.loads(text).get("post_processor")) if part["type"] == "ByteLevel"]
    parts = [*kept, _template(token, token_id)]
    processor = parts[0] if len(parts) == 1 else {"type": "Sequence", "processors": parts}
    text, old = _with_value(text, "post_processor", json.dumps(processor, ensure_ascii=False))
    written[TOKENIZER_NAME] = text.encode()
    config = parse_json(files[TOKENIZER_CONFIG_NAME], TOKENIZER_CONFIG_NAME)
    before = {"post_processor": old, **{key: config[key] for key in _CHANGED if key in config}}
    if ROLES_NAME in files:
        roles = parse_json(files[ROLES_NAME], ROLES_NAME)
        before |= {"role": roles["bos_token"]} if "bos_token" in roles else {}
        written[ROLES_NAME] = json_bytes({**roles, "bos_token": token})
    shown, meant = (json.dumps(each, ensure_ascii=False) for each in (token, bos_token))
    templated = TEMPLATE_NAME in files or config.get("chat_template")
    prefix = f"{{% set bos_token = {meant} %}}{{{{ {shown} }}}}" if templated else ""
    if TEMPLATE_NAME in files:
        written[TEMPLATE_NAME] = prefix.encode() + files[TEMPLATE_NAME]
    config = _with_templates(config, lambda template: prefix + template)
    ours = {"start_token": token, "chat_prefix": prefix, "before": before}
    # Before transformers 5 the type of each token is handed to the model, too, unless the names of its inputs are told.
    config = {"model_input_names": ["input_ids", "attention_mask"], **config, "bos_token": token, "add_bos_token": True}
    written[TOKENIZER_CONFIG_NAME] = json_bytes({**config, _KEY: ours})
    return written


def without_start_token(files: Mapping[str, bytes]) -> dict[str, bytes]:
    """The files as they were before :func:`with_start_token`; other files as they are."""
    restored = dict(files)
    if _KEY.encode() not in files.get(TOKENIZER_CONFIG_NAME, b""):
        return restored
    try:
        config = parse_json(files[TOKENIZER_CONFIG_NAME], TOKENIZER_CONFIG_NAME)
        ours = config.pop(_KEY)
        prefix, before = ours["chat_prefix"], ours["before"]
        text, _ = _with_value(files[TOKENIZER_NAME].decode(), "post_processor", before["post_processor"])
        restored[TOKENIZER_NAME] = text.encode()
        if ROLES_NAME in files:
            restored[ROLES_NAME] = json_bytes(
                _put(parse_json(files[ROLES_NAME], ROLES_NAME), "bos_token", before, "role")
            )
        if TEMPLATE_NAME in files:
            restored[TEMPLATE_NAME] = files[TEMPLATE_NAME].removeprefix(prefix.encode())
        for key in _CHANGED:
            config = _put(config, key, before, key)
        config = _with_templates(config, lambda template: template.removeprefix(prefix))
        restored[TOKENIZER_CONFIG_NAME] = json_bytes(config)
    except (UserError, ValueError, LookupError, TypeError, AttributeError):  # damaged, or the key of someone else
        return dict(files)
    return restored


def _template(token: str, token_id: int) -> dict[str, Any]:
    """The post-processor that puts a token before a text, and before either text of a pair."""

    def piece(kind: str, name: str, type_id: int) -> dict[str, Any]:
        return {kind: {"id": name, "type_id": type_id}}

    single = [piece("SpecialToken", token, 0), piece("Sequence", "A", 0)]
    return {
        "type": "TemplateProcessing",
        "single": single,
        "pair": [*single, piece("SpecialToken", token, 1), piece("Sequence", "B", 1)],
        "special_tokens": {token: {"id": token, "ids": [token_id], "tokens": [token]}},
    }


def _parts(processor: Any) -> list[dict[str, Any]]:
    """The post-processors one after the other; those that put other tokens before a text are among them."""
    if processor is None:
        return []
    return list(processor["processors"]) if processor["type"] == "Sequence" else [processor]


def _with_templates(config: dict[str, Any], change: Callable[[str], str]) -> dict[str, Any]:
    """The configuration with a change to its chat template, or to each of its named ones."""
    template = config.get("chat_template")
    if isinstance(template, str):
        return {**config, "chat_template": change(template)}
    if isinstance(template, list):
        return {**config, "chat_template": [{**each, "template": change(each["template"])} for each in template]}
    return config


def _put(values: dict[str, Any], key: str, before: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The mapping with what ``before`` has by a name in the place of a key, or without the key where it has nothing."""
    if name in before:
        return {**values, key: before[name]}
    return {each: value for each, value in values.items() if each != key}


def _with_value(text: str, key: str, value: str | None) -> tuple[str, str | None]:
    """The text of a JSON object with another value of a key, and the text of the old value; all else stays as it is.

    Args:
        text: The text of the object.
        key: The key.
        value: The text of the value; None: the key is removed, which an earlier call has put in front.

    Returns:
        Both texts; None for the old value where the key was not there.
    """
    front = place = text.index("{") + 1
    while text[start := _skipped(text, place)] != "}":
        name, place = _DECODER.raw_decode(text, start)
        begin = _skipped(text, place)
        _, place = _DECODER.raw_decode(text, begin)
        if name == key:
            if value is None:
                return text[:start] + text[place:].removeprefix(", "), text[begin:place]
            return text[:begin] + value + text[place:], text[begin:place]
    return (text if value is None else f'{text[:front]}"{key}": {value}, {text[front:]}'), None


_DECODER = json.JSONDecoder()
_BETWEEN = re.compile(r"[\s,:]*")


def _skipped(text: str, place: int) -> int:
    """The next place that holds something else than white space and separators."""
    found = _BETWEEN.match(text, place)
    assert found is not None  # it matches nothing, too
    return found.end()
