"""The page `/docs`: the OpenAPI document as HTML that loads nothing from other servers."""

from html import escape
from typing import Any

from owl2 import html


def docs_page(document: dict[str, Any], example: str) -> str:
    """The page as HTML.

    Args:
        document: From `FastAPI.openapi`.
        example: A shell command that sends a request.
    """
    parts = [
        f"<p>{escape(document['info']['description'])}</p>",
        f"<pre style='white-space: pre-wrap'><code>{escape(example)}</code></pre>",
        '<p>For programs: <a href="openapi.json">openapi.json</a></p>',
    ]
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            parts.append(f"<h2><code>{method.upper()} {escape(path)}</code></h2>")
            parts.append(f"<p>{escape(operation.get('description', ''))}</p>")
            for content in operation.get("requestBody", {}).get("content", {}).values():
                parts.append(f"<p>Request body: {escape(_type(content['schema']))}</p>")
            rows = [
                (status, response["description"], _content(response))
                for status, response in operation["responses"].items()
            ]
            parts.append(html.table(("Status", "Description", "Response"), rows))
    for name, schema in document["components"]["schemas"].items():
        parts.append(f"<h2><code>{escape(name)}</code></h2>")
        parts.append(f"<p>{escape(schema.get('description', ''))}</p>")
        required = schema.get("required", [])
        rows = [
            (field, _type(value) + " (required)" * (field in required), _description(value))
            for field, value in schema.get("properties", {}).items()
        ]
        parts.append(html.table(("Field", "Type", "Description"), rows))
    return html.page(document["info"]["title"], "\n".join(parts), "th, td { text-align: left }")


def _content(response: dict[str, Any]) -> str:
    contents = response.get("content", {}).items()
    return ", ".join(f"{kind} {_type(content.get('schema', {}))}" for kind, content in contents)


def _description(schema: dict[str, Any]) -> str:
    default = schema.get("default")
    text = schema.get("description", "")
    return text if default is None else f"{text} Default: {default}.".strip()


def _type(schema: dict[str, Any]) -> str:
    """A JSON schema in a few words."""
    if "$ref" in schema:
        return str(schema["$ref"]).rpartition("/")[2]
    for key in ("anyOf", "oneOf"):
        if key in schema:
            return " or ".join(_type(kind) for kind in schema[key] if kind.get("type") != "null")
    if "enum" in schema or "const" in schema:
        return " or ".join(map(repr, schema.get("enum", [schema.get("const")])))
    if schema.get("type") == "array":
        return f"array of {_type(schema.get('items', {}))}"
    ranges = [
        f"{sign} {schema[key]}"
        for key, sign in (
            ("minimum", "≥"),
            ("exclusiveMinimum", ">"),
            ("maximum", "≤"),
            ("exclusiveMaximum", "<"),
        )
        if key in schema
    ]
    return " ".join([schema.get("type", ""), *ranges]).strip()
