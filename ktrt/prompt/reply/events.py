"""The pieces that a reply consists of."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Reasoning:
    """Text of a thought."""

    text: str


@dataclass(frozen=True)
class Content:
    """Text of the answer."""

    text: str


@dataclass(frozen=True)
class ToolCallStart:
    """The begin of the reply's call number ``index``, from 0."""

    index: int
    id: str
    name: str


@dataclass(frozen=True)
class ToolArguments:
    """Text of call ``index``'s arguments. All of them together are a JSON object, as far as the
    model wrote one."""

    index: int
    text: str


Event = Reasoning | Content | ToolCallStart | ToolArguments


def joined(events: list[Event]) -> list[Event]:
    """Returns the events with neighbouring texts of one kind as one."""
    if len(events) < 2:
        return events
    found: list[Event] = []
    for event in events:
        last = found[-1] if found else None
        if isinstance(event, Reasoning) and isinstance(last, Reasoning):
            found[-1] = Reasoning(last.text + event.text)
        elif isinstance(event, Content) and isinstance(last, Content):
            found[-1] = Content(last.text + event.text)
        elif isinstance(event, ToolArguments) and isinstance(last, ToolArguments):
            if event.index != last.index:
                found.append(event)
            else:
                found[-1] = ToolArguments(last.index, last.text + event.text)
        else:
            found.append(event)
    return found
