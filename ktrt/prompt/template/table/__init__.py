"""The named chat templates, as data.

Names and strings are LLaMA-Factory 0.9.5's. An adapter needs exactly the strings of its training,
which differ in places from the chat template of the model's tokenizer. Pictures and sound are left
out; ``tools`` has the strings of tools.
"""

from collections.abc import Mapping

from ktrt.prompt.template.table.chatml import CHATML_TEMPLATES
from ktrt.prompt.template.table.marked import MARKED_TEMPLATES
from ktrt.prompt.template.table.plain import PLAIN_TEMPLATES
from ktrt.prompt.template.table.spec import TemplateSpec, Thought

__all__ = ["TEMPLATES", "TemplateSpec", "Thought"]

TEMPLATES: Mapping[str, TemplateSpec] = dict(
    sorted((CHATML_TEMPLATES | MARKED_TEMPLATES | PLAIN_TEMPLATES).items())
)
