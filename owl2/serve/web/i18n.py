"""All texts of the page, in English and Chinese.

The browser receives both languages and selects one. Texts that the server sends later are in the
language that the page has at that time.
"""

import html
import json
from pathlib import Path

import gradio as gr

from owl2.serve.errors import ApiError, as_api_error

LANGUAGES = {"en": "English", "zh": "中文"}

# By key and language. test_i18n.py checks that no text is missing or unused.
TEXTS: dict[str, dict[str, str]] = json.loads(
    Path(__file__).with_name("texts.json").read_text("utf-8")
)

# The Chinese page shows these texts for the error codes; the English page shows the message.
CHINESE_ERRORS = {
    "too_many_images": "这个对话里的图片太多了。",
    "invalid_image": "无法读取该图片，或文件已损坏。",
    "image_too_large": "这张图片太大了。",
    "too_many_videos": "这个对话里的视频太多了。",
    "invalid_video": "无法读取该视频，或文件已损坏。",
    "video_too_large": "这个视频太大或太长了。",
    "too_many_messages": "这个对话太长了，请开始新对话。",
    "context_length_exceeded": "文字太长了，请缩短问题或开始新对话。",
    "rate_limit_exceeded": "服务器正忙，请稍后再试。",
    "timeout": "回答未能在规定时间内完成。",
    "shutting_down": "服务器正在关闭。",
}


def text(key: str, language: str, **values: object) -> str:
    """The text of a key; in English for an unknown language."""
    texts = TEXTS[key]
    return texts.get(language, texts["en"]).format(**values)


def translations() -> dict[str, dict[str, str]]:
    """All texts by key, for each locale of a browser. All Chinese locales get the Chinese texts."""
    locales = {"en": "en", "zh": "zh", "zh-CN": "zh", "zh-TW": "zh"}
    return {
        locale: {key: texts[language] for key, texts in TEXTS.items()}
        for locale, language in locales.items()
    }


def error_text(error: ApiError, language: str) -> str:
    """The text that the page shows for an error."""
    if error.status >= 500 and error.code is None:
        return text("error_500", language)
    if language == "zh" and error.code in CHINESE_ERRORS:
        return CHINESE_ERRORS[error.code]
    return error.message


def show_info(key: str, language: str) -> None:
    """Show a notification."""
    gr.Info(text(key, language))


def show_error(error: Exception, language: str) -> None:
    """Show an error until it is closed; an unexpected exception is logged and not shown."""
    message = html.escape(error_text(as_api_error(error), language))  # gradio renders HTML
    gr.Warning(message, duration=None)
