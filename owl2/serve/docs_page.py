"""The OpenAPI document as a page to read: `/docs`.

FastAPI's own page takes its scripts from another server; this one is whole, and works offline.
"""

import re
from collections.abc import Sequence
from html import escape
from typing import Any

STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h2 { margin-top: 2.5rem; font-size: 1.15rem; } h3 { margin: 1.2rem 0 .4rem; font-size: 1rem; }
code { font: .9em ui-monospace, monospace; } .method { color: #b3590f; margin-right: .5rem; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; padding: .8rem; border: 1px solid #8885;
border-radius: 6px; }
table { border-collapse: collapse; width: 100%; } td, th { text-align: left; vertical-align: top;
padding: .3rem .8rem .3rem 0; border-bottom: 1px solid #8884; } th { font-weight: 600; }
.scroll { overflow-x: auto; }
"""


def page(document: dict[str, Any], example: str) -> str:
    """HTML.

    Args:
        document: what `FastAPI.openapi` gives.
        example: a command that works.
    """
    info = document["info"]
    parts = [
        f"<h1>{escape(info['title'])}</h1>",
        f"<p>{_words(info.get('description', ''))}</p>",
        f"<pre><code>{escape(example)}</code></pre>",
        '<p>For programs: <a href="openapi.json">openapi.json</a></p>',
    ]
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            parts += _operation(document, path, method, operation)
    parts.append("<h1>Objects</h1>")
    for name, schema in document.get("components", {}).get("schemas", {}).items():
        parts.append(f'<h2 id="{escape(name)}"><code>{escape(name)}</code></h2>')
        parts += [f"<p>{_words(schema.get('description', ''))}</p>", _fields(schema)]
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(info['title'])}</title><style>{STYLE}</style></head>"
        f"<body>{''.join(parts)}</body></html>"
    )


def _operation(
    document: dict[str, Any], path: str, method: str, operation: dict[str, Any]
) -> list[str]:
    description = operation.get("description") or operation.get("summary", "")
    parts = [
        f'<h2><code><span class="method">{escape(method.upper())}</span>{escape(path)}</code></h2>',
        *(f"<p>{_words(text)}</p>" for text in description.split("\n\n")),
    ]
    for content in operation.get("requestBody", {}).get("content", {}).values():
        parts.append(f"<p>Body: {_type(content['schema'])}</p>")
    rows = []
    for status, reply in operation["responses"].items():
        kinds = [
            f"<code>{escape(kind)}</code> {_type(content['schema']) if content else ''}"
            for kind, content in reply.get("content", {}).items()
        ]
        rows.append((escape(status), escape(reply["description"]), "<br>".join(kinds)))
    return [*parts, _table(("Status", "", "Reply"), rows)]


def _fields(schema: dict[str, Any]) -> str:
    needed = schema.get("required", [])
    rows = []
    for name, field in schema.get("properties", {}).items():
        default = field.get("default")
        more = "needed" if name in needed else "" if default is None else f"default: {default}"
        text = " ".join(filter(None, (_words(field.get("description", "")), escape(more))))
        rows.append((f"<code>{escape(name)}</code>", _type(field), text))
    return _table(("Field", "Type", ""), rows) if rows else f"<p>{_type(schema)}</p>"


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = ["".join(f"<th>{cell}</th>" for cell in head)]
    lines += ["".join(f"<td>{cell}</td>" for cell in row) for row in rows]
    return f'<div class="scroll"><table><tr>{"</tr><tr>".join(lines)}</tr></table></div>'


def _words(text: str) -> str:
    """Text with `code` in it."""
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", escape(text))


def _type(schema: dict[str, Any]) -> str:
    """A JSON schema in a few words, with links to the objects that it names."""
    if "$ref" in schema:
        name = escape(schema["$ref"].rpartition("/")[2])
        return f'<a href="#{name}"><code>{name}</code></a>'
    for key in ("anyOf", "oneOf"):
        if key in schema:
            return " or ".join(_type(kind) for kind in schema[key] if kind.get("type") != "null")
    if "enum" in schema:
        return " or ".join(f"<code>{escape(repr(value))}</code>" for value in schema["enum"])
    if "const" in schema:
        return f"<code>{escape(repr(schema['const']))}</code>"
    if schema.get("type") == "array":
        return f"list of {_type(schema.get('items', {}))}"
    bounds = [
        f"{words} {schema[key]}"
        for key, words in (
            ("minimum", "from"),
            ("exclusiveMinimum", "above"),
            ("maximum", "to"),
            ("exclusiveMaximum", "below"),
            ("maxLength", "length to"),
        )
        if key in schema
    ]
    return escape(" ".join([schema.get("type", "anything"), *bounds]))
