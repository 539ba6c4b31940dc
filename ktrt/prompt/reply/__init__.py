"""Reads a reply's text: thoughts, content and tool calls, as they come.

``table`` describes how the families of models write them, as data; ``parser`` reads by it.
"""

from ktrt.prompt.reply.events import Content, Event, Reasoning, ToolArguments, ToolCallStart, joined
from ktrt.prompt.reply.parser import ReplyParser, reply_format, reply_parser
from ktrt.prompt.reply.structure import calls_structure, json_structure
from ktrt.prompt.reply.table import ReplyFormat

__all__ = [
    "Content",
    "Event",
    "Reasoning",
    "ReplyFormat",
    "ReplyParser",
    "ToolArguments",
    "ToolCallStart",
    "calls_structure",
    "joined",
    "json_structure",
    "reply_format",
    "reply_parser",
]
