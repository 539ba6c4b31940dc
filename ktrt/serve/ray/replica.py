"""A replica of the model: the whole application, which a router calls."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from typing import TYPE_CHECKING, Any

from ray import serve

from ktrt.command_line import set_environment
from ktrt.errors import KtrtError
from ktrt.serve.errors import ApiError
from ktrt.serve.ray.arguments import read_arguments

if TYPE_CHECKING:
    from starlette.types import Message, Receive, Scope

# Response header with the replica's name.
REPLICA_HEADER = b"x-ktrt-replica"
# Adapters and sums that a replica is known for at most; the one used least recently is forgotten,
# which costs the next request its cached prefix.
_STICKING = 1024


class ModelReplica:
    """A model and the application over it."""

    def __init__(self, args: Mapping[str, Any]) -> None:
        config, settings = read_arguments(args)
        set_environment()
        from ktrt.api import open_session
        from ktrt.serve.app import create_app

        self._session = open_session(config)
        self._app = create_app(self._session, settings)
        self._names = self._app.state.server.names
        self._name = serve.get_replica_context().replica_id.unique_id.encode()

    def __del__(self) -> None:
        if hasattr(self, "_session"):
            self._session.close()

    def check_health(self) -> None:
        """Ray calls this every few seconds, and replaces the replica when it raises."""
        if not self._session.alive:
            raise KtrtError("the engine has failed")

    async def answer(self, scope: Scope, body: bytes) -> AsyncIterator[list[Message]]:
        """Yields the application's messages, those that are there at once together. Cancelling the
        call ends the request."""
        await self._note_adapter()
        messages: asyncio.Queue[Message] = asyncio.Queue()
        task = asyncio.ensure_future(self._app(scope, _receiver(body), messages.put))
        ended = False
        try:
            while not ended:
                found = [await _next(messages, task)]
                while not messages.empty():
                    found.append(messages.get_nowait())
                ended = any(_is_last(each) for each in found)
                yield [self._named(each) for each in found]
        finally:
            if not ended:
                task.cancel()
            await asyncio.wait({task})

    async def answer_whole(self, scope: Scope, body: bytes) -> list[Message]:
        """Returns all messages of a request that goes to every replica."""
        return [each async for some in self.answer(scope, body) for each in some]

    async def _note_adapter(self) -> None:
        """Tells Ray, by way of its cache of models, that this replica answers for the adapter."""
        name = serve.get_multiplexed_model_id()
        if not name:
            return
        try:
            chosen = self._names.resolve(name)
        except ApiError:
            return  # the application says so
        if chosen is not None:
            await self._stick(name)

    @serve.multiplexed(max_num_models_per_replica=_STICKING)  # type: ignore[untyped-decorator]
    async def _stick(self, name: str) -> str:
        """Loads nothing: every replica has all adapters."""
        return name

    def _named(self, message: Message) -> Message:
        if message["type"] == "http.response.start":
            message["headers"] = [*message.get("headers", ()), (REPLICA_HEADER, self._name)]
        return message


def _receiver(body: bytes) -> Receive:
    """Returns the ``receive`` of a request with this body, whose client never leaves: when it does,
    the call is cancelled."""
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> Message:
        if messages:
            return messages.pop()
        return await asyncio.Future()

    return receive


async def _next(messages: asyncio.Queue[Message], task: asyncio.Future[None]) -> Message:
    """Returns the application's next message. Raises what ended it before its last message."""
    getting = asyncio.ensure_future(messages.get())
    try:
        either: set[asyncio.Future[Any]] = {getting, task}
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        if getting.done():
            return getting.result()
        if not messages.empty():
            return messages.get_nowait()
        task.result()
        raise ConnectionError("the application ended its response before its last message")
    finally:
        getting.cancel()


def _is_last(message: Message) -> bool:
    return message["type"] == "http.response.body" and not message.get("more_body")
