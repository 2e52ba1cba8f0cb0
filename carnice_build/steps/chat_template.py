"""Step `chat_template`: change how the model is made to write tool calls; moves no byte."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from pydantic import Field

from carnice_build.chat.files import named_templates, template_files, with_template
from carnice_build.chat.hermes import to_hermes
from carnice_build.chat.special_tokens import special_tokens
from carnice_build.chat.tool_format import Syntax, tool_format
from carnice_build.errors import PlanError
from carnice_build.graph import View
from carnice_build.steps.base import PlanContext, Step


class ChatTemplate(Step):
    """Patch the chat template that is packaged; the serving flags follow from it."""

    patch: Literal["hermes"] = Field(
        description="`hermes`: tool calls as JSON between tool_call tags, instead of Qwen3's XML."
    )

    def apply(self, view: View, context: PlanContext) -> View:
        """The view as it is: a template is no tensor."""
        return view

    def edit(self, files: Mapping[str, bytes], context: PlanContext) -> Mapping[str, bytes]:
        """The files with every copy of the template patched; PlanError when there is none.

        So is a named template beside it that writes Qwen3's XML; one that does not stays.
        """
        templates = template_files(files)
        if not files and not context.body.buildable:
            return files  # a shape file has names and shapes, but no files
        if not templates:
            raise PlanError("there is no chat template to patch", expected="chat_template.jinja")
        tokens = special_tokens(files)
        for name, template in named_templates(files).items():
            if tool_format(template, name, tokens).syntax is Syntax.QWEN3_XML:
                templates[name] = template
        edited = dict(files)
        for name, template in templates.items():
            edited[name] = with_template(name, edited[name], to_hermes(template, name, tokens))
        return edited
