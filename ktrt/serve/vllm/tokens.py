"""Routes: vLLM's tokenize, detokenize and tokenizer_info."""

from __future__ import annotations

import asyncio
from functools import cache
from typing import Annotated, Any

from fastapi import APIRouter, Depends
from pydantic import BaseModel, ConfigDict, StrictInt

from ktrt.prompt.tokenizer.words import vocabulary_size
from ktrt.serve.errors import ApiError
from ktrt.serve.openai.conversation import readable_messages, thinking_of, thinking_switch
from ktrt.serve.openai.prompts import encode
from ktrt.serve.openai.schema import JsonObject
from ktrt.serve.openai.schema_chat import Messages, Tools
from ktrt.serve.server import Server, get_server

router = APIRouter()

_ServerDependency = Annotated[Server, Depends(get_server)]


class TokenizeRequest(BaseModel):
    """Either ``prompt`` or ``messages``.

    ``add_special_tokens``: whether a prompt gets what the tokenizer puts in front of every text
    (BOS), as /v1/completions does; the chat template writes it for messages. ``return_token_strs``:
    the tokens' own spellings too.
    """

    model_config = ConfigDict(extra="allow")

    model: str | None = None
    prompt: str | None = None
    messages: Messages | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    tools: Tools = None
    chat_template: str | None = None
    chat_template_kwargs: JsonObject | None = None


class TokenizeResponse(BaseModel):
    """``max_model_len``: the most tokens of a prompt with its answer."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class DetokenizeRequest(BaseModel):
    """Token ids to be read as text."""

    model_config = ConfigDict(extra="allow")

    model: str | None = None
    tokens: list[StrictInt]


class DetokenizeResponse(BaseModel):
    """The text, special tokens included."""

    prompt: str


class TokenizerInfo(BaseModel):
    """The tokenizer, and the template of prompts: its name, and the text of the tokenizer's own,
    which only ``auto`` uses."""

    tokenizer_class: str
    template: str
    chat_template: str | None
    vocab_size: int
    max_model_len: int
    bos_token: str | None
    bos_token_id: int | None
    eos_token: str | None
    eos_token_id: int | None
    pad_token: str | None
    unk_token: str | None
    stop_token_ids: list[int]
    special_tokens: dict[str, int]


@router.post("/tokenize")
async def tokenize(request: TokenizeRequest, server: _ServerDependency) -> TokenizeResponse:
    """Returns the tokens that a prompt, or a conversation, is to the model."""
    return await asyncio.to_thread(_tokenize, server, request)


@router.post("/detokenize")
async def detokenize(request: DetokenizeRequest, server: _ServerDependency) -> DetokenizeResponse:
    """Returns the text of tokens."""
    return await asyncio.to_thread(_detokenize, server, request)


@router.get("/tokenizer_info")
async def tokenizer_info(server: _ServerDependency) -> TokenizerInfo:
    """Describes the tokenizer."""
    return await asyncio.to_thread(_info, server)


def _tokenize(server: Server, request: TokenizeRequest) -> TokenizeResponse:
    _check_model(server, request.model)
    session = server.session
    if (request.prompt is None) == (request.messages is None):
        raise ApiError(400, "prompt: expected either prompt or messages", param="prompt")
    if request.prompt is not None:
        add = request.add_special_tokens is not False
        ids = encode(session, request.prompt, add_special_tokens=add)
    else:
        _check_options(request)
        thinking = thinking_of(server, thinking_switch(request.chat_template_kwargs, None))
        messages = readable_messages(request.messages)
        ids = session.render(messages, tools=request.tools or None, thinking=thinking)
    spellings = session.tokenizer.convert_ids_to_tokens(ids) if request.return_token_strs else None
    return TokenizeResponse(
        count=len(ids), max_model_len=session.context_limit, tokens=ids,
        token_strs=None if spellings is None else [_spelled(each) for each in spellings],
    )  # fmt: skip


def _check_options(request: TokenizeRequest) -> None:
    """Refuses what would be other tokens than the ones of an answer."""
    if request.add_generation_prompt is False:
        raise ApiError(
            400, "add_generation_prompt: expected true: prompts end where the answer begins",
            param="add_generation_prompt",
        )  # fmt: skip
    if request.continue_final_message:
        raise ApiError(
            400, "continue_final_message: expected false: the last message is the user's",
            param="continue_final_message",
        )  # fmt: skip
    if request.chat_template is not None:
        raise ApiError(
            400, "chat_template: the template is a setting of the server", param="chat_template"
        )


def _spelled(token: str | bytes | None) -> str:
    """Returns a token as the vocabulary spells it; tiktoken's has bytes."""
    return token.decode("utf-8", "replace") if isinstance(token, bytes) else token or ""


def _detokenize(server: Server, request: DetokenizeRequest) -> DetokenizeResponse:
    _check_model(server, request.model)
    size = _vocabulary_size(server.session.tokenizer)
    for index, token in enumerate(request.tokens):
        if not 0 <= token < size:
            raise ApiError(
                400, f"tokens[{index}]: expected a token id below {size}, found {token:.0f}",
                param="tokens",
            )  # fmt: skip
    text = server.session.tokenizer.decode(
        request.tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False
    )
    return DetokenizeResponse(prompt=text)


def _check_model(server: Server, model: str | None) -> None:
    """All models have one tokenizer; a name that nobody has is a mistake all the same."""
    if model:
        server.names.resolve(model)


@cache
def _vocabulary_size(tokenizer: Any) -> int:
    return vocabulary_size(tokenizer)


def _info(server: Server) -> TokenizerInfo:
    session, tokenizer = server.session, server.session.tokenizer
    chat_template = getattr(tokenizer, "chat_template", None)
    special = {each: tokenizer.convert_tokens_to_ids(each) for each in tokenizer.all_special_tokens}
    return TokenizerInfo(
        tokenizer_class=type(tokenizer).__name__,
        template=session.template.name,
        chat_template=chat_template if isinstance(chat_template, str) else None,
        vocab_size=_vocabulary_size(tokenizer),
        max_model_len=session.context_limit,
        bos_token=tokenizer.bos_token,
        bos_token_id=tokenizer.bos_token_id,
        eos_token=tokenizer.eos_token,
        eos_token_id=tokenizer.eos_token_id,
        pad_token=getattr(tokenizer, "pad_token", None),
        unk_token=getattr(tokenizer, "unk_token", None),
        stop_token_ids=sorted(session.template.stop_ids),
        special_tokens=special,
    )
