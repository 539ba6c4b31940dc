"""Server-sent events, and requests whose client may leave."""

from __future__ import annotations

import asyncio
import json
import logging
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Any, TypeVar

from starlette.requests import ClientDisconnect
from starlette.responses import StreamingResponse

from ktrt.serve.errors import as_api_error

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Coroutine, Mapping, Sequence

    from starlette.types import Receive, Scope, Send

    from ktrt.serve.errors import ApiError
    from ktrt.serve.generation import Generation

T = TypeVar("T")
logger = logging.getLogger(__name__)

# Compact, and made once: json.dumps makes one for each call with such arguments.
encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode
# Describes a stream: text as a whole, and an object for readers that check event by event.
STREAMED: dict[int | str, dict[str, Any]] = {
    200: {"content": {"text/event-stream": {"schema": {"type": ["string", "object"]}}}}
}
DONE = "data: [DONE]\n\n"
# Without these a proxy may collect events before it passes them on.
_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


def event(data: Mapping[str, Any], name: str | None = None) -> str:
    """Returns one event of a stream."""
    text = encode(data)
    return f"event: {name}\ndata: {text}\n\n" if name else f"data: {text}\n\n"


async def unless_gone(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """Returns the result of ``work``, and cancels it when the client leaves: ``ClientDisconnect``.
    The request's body must have been read."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_gone(receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientDisconnect
    finally:
        task.cancel()
        gone.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(StreamingResponse):
    """Sends events as they come. Leaves ``context`` at the end, whatever it is: all sent, the
    client gone, or an exception."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[str], context: AsyncExitStack) -> None:
        super().__init__(events, headers=_HEADERS)
        self._context = context
        context.push_async_callback(events.aclose)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        # Not in the events' own code: a client that leaves early never starts it.
        async with self._context:
            await super().__call__(scope, receive, send)


async def event_stream(
    answers: Generation, events: Callable[[Generation], AsyncGenerator[str]]
) -> EventStream:
    """Submits a request and returns the stream of its ``events``. ``ApiError``, before a status is
    sent: it was refused."""
    context = AsyncExitStack()
    generation = await context.enter_async_context(answers)
    return EventStream(events(generation), context)


def failure(error: Exception) -> ApiError:
    """Returns the error that ends a stream, whose status was sent long ago."""
    found = as_api_error(error)
    if found.status >= 500:
        logger.error("A stream failed: %s", error, exc_info=error)
    return found


async def merged(streams: Sequence[AsyncGenerator[T]]) -> AsyncGenerator[tuple[int, T]]:
    """Yields (place, item) of several streams as they come. The first exception ends all."""
    waiting: dict[asyncio.Future[T], int] = {}

    def wait_for(place: int) -> None:
        waiting[asyncio.ensure_future(anext(streams[place]))] = place

    try:
        for place in range(len(streams)):
            wait_for(place)
        while waiting:
            done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for each in sorted(done, key=waiting.__getitem__):
                place = waiting.pop(each)
                try:
                    item = each.result()
                except StopAsyncIteration:
                    continue
                wait_for(place)
                yield place, item
    finally:
        for each in waiting:
            each.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        for stream in streams:
            await stream.aclose()
