"""POST /tokenize and /detokenize: token ids of texts and conversations, and texts of token ids."""

import asyncio
from typing import Any

from qwen_jax.serve import chats
from qwen_jax.serve.exchange import LONG, encode
from qwen_jax.serve.protocol import DetokenizeRequest, TokenizeRequest
from qwen_jax.serve.refusals import Refusal, invalid
from qwen_jax.serve.served import Served
from qwen_jax.serve.tool_choice import tools_of


async def tokenize(body: TokenizeRequest, served: Served) -> dict[str, Any]:
    """Return the ids of a text, or those that the chat route runs for a conversation."""
    served.named(body.model)
    if (body.prompt is None) == (body.messages is None):
        raise Refusal(400, "prompt or messages: one of them is needed", param="prompt")
    if body.prompt is not None:
        ids = await encode(served, body.prompt)
    else:
        ids = (await chats.prompt(body, served, tools=tools_of(body))).ids
    table = served.tokenizer.id_to_bytes
    strings = None
    if body.return_token_strs:
        strings = [table[i].decode("utf-8", "replace") for i in ids]
    return {
        "count": len(ids),
        "max_model_len": served.longest,
        "tokens": list(ids),
        "token_strs": strings,
    }


async def detokenize(body: DetokenizeRequest, served: Served) -> dict[str, Any]:
    """Return the text of token ids. Many take as long as many steps, so a thread reads them."""
    served.named(body.model)
    if len(body.tokens) < LONG:
        return _text(body, served)
    return await asyncio.to_thread(_text, body, served)


def _text(body: DetokenizeRequest, served: Served) -> dict[str, Any]:
    if wrong := [i for i in body.tokens if i >= served.vocab_size]:
        what = f"token id {wrong[0]} is out of range: from 0 to {served.vocab_size - 1}"
        raise invalid("tokens", what)
    try:
        return {"prompt": served.tokenizer.decode(body.tokens)}
    except ValueError as error:
        raise invalid("tokens", str(error)) from None
