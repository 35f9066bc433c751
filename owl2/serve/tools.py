"""Tools of a chat request.

The model cannot choose a function, but a request can choose one for it. The answer is then JSON
that follows the schema of the function's parameters: the arguments of the call.
"""

from typing import Any, Literal, Self

from pydantic import Field, ValidationError, model_validator

from owl2.engine.sampling_params import StructuredOutputsParams
from owl2.serve.sampling_fields import MAX_TOOLS, FunctionName, OpenAIBaseModel, field_error


class NamedToolChoice(OpenAIBaseModel):
    """The function that the model calls."""

    type: Literal["function"]
    function: FunctionName


class FunctionDefinition(FunctionName):
    """A function: `parameters` is a JSON schema; default: any object."""

    parameters: dict[str, Any] | None = None


class FunctionTool(OpenAIBaseModel):
    """A tool that the model can be made to call."""

    type: Literal["function"]
    function: FunctionDefinition


class ToolFields(OpenAIBaseModel):
    """The fields of a chat request about tools."""

    tools: list[dict[str, Any]] | None = Field(None, max_length=MAX_TOOLS)
    tool_choice: Literal["none", "auto", "required"] | NamedToolChoice | None = None
    functions: list[dict[str, Any]] | None = Field(None, max_length=MAX_TOOLS)
    function_call: Literal["none", "auto"] | None = None

    @model_validator(mode="after")
    def _check_tools(self) -> Self:
        is_chosen = self.forced_function is not None
        if self.tools and isinstance(self.tool_choice, NamedToolChoice) and not is_chosen:
            name = self.tool_choice.function.name
            raise field_error("tool_choice", f"tools has no valid function with the name {name!r}")
        if self.tools and self.tool_choice != "none" and not is_chosen:
            raise field_error(
                "tools",
                "the model cannot choose tools; remove this field, set tool_choice to 'none', or "
                "choose one of the functions with tool_choice",
            )
        if not self.tools and self.tool_choice not in (None, "none", "auto"):
            raise field_error("tool_choice", "it requires tools")
        if self.functions and self.function_call != "none":
            raise field_error(
                "functions",
                "the model cannot choose functions; remove this field, or use tools",
            )
        return self

    @property
    def forced_function(self) -> FunctionDefinition | None:
        """The function that the answer calls: the named one, or the only one that is required."""
        choice, tools = self.tool_choice, self.tools or []
        if isinstance(choice, NamedToolChoice):
            tools = [tool for tool in tools if _name(tool) == choice.function.name]
        elif choice != "required" or len(tools) != 1:
            return None
        try:
            return FunctionTool.model_validate(tools[0]).function if tools else None
        except ValidationError:
            return None

    def tool_constraint(self) -> dict[str, StructuredOutputsParams]:
        """What the arguments of the call must match, by the field that requests it."""
        if (function := self.forced_function) is None:
            return {}
        schema = function.parameters or {"type": "object"}
        return {"tool_choice": StructuredOutputsParams(json=schema)}


def _name(tool: dict[str, Any]) -> Any:
    function = tool.get("function")
    return function.get("name") if isinstance(function, dict) else None
