"""All texts of the page, in English and Chinese.

The browser receives both languages and selects one. Texts that the server sends later are in the
language that the page has at that time.
"""

import html

import gradio as gr

from owl2.serve.errors import ApiError, as_api_error

LANGUAGES = {"en": "English", "zh": "中文"}

# Key: (English, Chinese).
TEXTS: dict[str, tuple[str, str]] = {
    "tab_chat": ("Chat", "对话"),
    "tab_attention": ("Attention", "注意力"),
    "tab_settings": ("Settings", "设置"),
    "language": ("Language", "语言"),
    "theme": ("Light or dark theme", "浅色或深色主题"),
    "welcome": (
        "### Ask about an image\nDrop one or more images here and type a question, "
        "or start with an example:",
        "### 就图片提问\n把一张或多张图片拖到这里并输入问题，或从下面的示例开始：",
    ),
    "chat": ("Conversation", "对话"),
    "question": ("Ask about an image …", "就图片提问……"),
    "regenerate": ("↻ Regenerate", "↻ 重新生成"),
    "clear": ("＋ New conversation", "＋ 新对话"),
    "show_attention": ("◎ Show attention", "◎ 显示注意力"),
    "max_new_tokens": ("Maximum length", "最大长度"),
    "max_new_tokens_info": (
        "In tokens. An English word is about 1.5 tokens.",
        "以词元（token）计，一个汉字约为一到两个词元。",
    ),
    "temperature": ("Temperature", "温度"),
    "temperature_info": (
        "0 always selects the most likely token, so that answers are reproducible. "
        "Higher values make answers more varied.",
        "0：始终选择概率最高的词元，回答可复现。数值越大，回答越多样。",
    ),
    "top_p": ("Top p", "Top p"),
    "top_p_info": (
        "Sample only from the most likely tokens whose total probability reaches this value.",
        "只从累计概率达到该值的最可能词元中采样。",
    ),
    "seed": ("Seed", "随机种子"),
    "seed_info": (
        "With a temperature above 0, the same seed gives the same answer. Empty: a random seed.",
        "温度大于 0 时，相同的种子得到相同的回答。留空则每次随机。",
    ),
    "attention_help": (
        "Ask about an image first. This tab then shows a heat map of the image for the complete "
        "answer or for one of its words.",
        "请先就图片提问。之后这里会显示图片的热力图，可针对整个回答或其中某个词查看。",
    ),
    "words": ("Words of the answer", "回答中的词"),
    "all_words": ("complete answer", "整个回答"),
    "image": ("Image", "图片"),
    "image_number": ("Image {number}", "图片 {number}"),
    "heat_map": ("Attention", "注意力"),
    "scale_low": ("average", "平均"),
    "scale_high": ("{times}× average", "平均的 {times} 倍"),
    "shares": ("Distribution of the attention", "注意力的分布"),
    "share_text": ("prompt text", "提示文字"),
    "share_answer": ("answer", "回答"),
    "sign_in": (
        "Enter any user name, and an API key as the password.",
        "用户名任意，密码为 API 密钥。",
    ),
    "truncated": (
        "(truncated at the maximum length; see Settings)",
        "（已达到最大长度，可在“设置”中调整）",
    ),
    "stopped": ("(stopped)", "（已停止）"),
    "empty": ("The model returned an empty answer.", "模型返回了空回答。"),
    "error_empty": ("Type a question first.", "请先输入问题。"),
    "error_seed": (
        "The seed must be an integer of at most 9 digits, or empty.",
        "随机种子必须是不超过 9 位的整数，或留空。",
    ),
    "error_no_image": ("The conversation contains no image.", "对话中没有图片。"),
    "error_no_answer": ("Ask a question first.", "请先提问。"),
    "error_file_expired": (
        "The file “{name}” has expired; add it again.",
        "文件“{name}”已过期，请重新添加。",
    ),
    "error_in_file": ("{name}: {error}", "{name}：{error}"),
    "error_500": (
        "Internal server error. See the server log for details.",
        "服务器内部错误，详情见服务器日志。",
    ),
}


# The Chinese page shows these texts for the error codes; the English page shows the message.
CHINESE_ERRORS = {
    "too_many_images": "这个对话里的图片太多了。",
    "invalid_image": "无法读取该图片，或文件已损坏。",
    "image_too_large": "这张图片太大了。",
    "too_many_messages": "这个对话太长了，请开始新对话。",
    "context_length_exceeded": "文字太长了，请缩短问题或开始新对话。",
    "rate_limit_exceeded": "服务器正忙，请稍后再试。",
    "timeout": "回答未能在规定时间内完成。",
    "shutting_down": "服务器正在关闭。",
}


def text(key: str, language: str, **values: object) -> str:
    """The text of a key; in English for an unknown language."""
    english, chinese = TEXTS[key]
    return (chinese if language == "zh" else english).format(**values)


def translations() -> dict[str, dict[str, str]]:
    """All texts by key, for each locale of a browser. All Chinese locales get the Chinese texts."""
    english = {key: texts[0] for key, texts in TEXTS.items()}
    chinese = {key: texts[1] for key, texts in TEXTS.items()}
    return {"en": english} | dict.fromkeys(("zh", "zh-CN", "zh-TW"), chinese)


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
    """Show an error as a notification; an unexpected exception is logged and not shown."""
    gr.Warning(html.escape(error_text(as_api_error(error), language)))  # gradio renders HTML
