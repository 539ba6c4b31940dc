"""The named chat templates: data.

Names and strings are those LLaMA-Factory 0.9.5 trains with: an adapter needs exactly those, which
differ in places from the chat template of the model's tokenizer. Tools, pictures and sound are
left out.
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
