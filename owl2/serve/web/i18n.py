"""All words of the page, in English and Chinese.

The browser is given both and shows the one that fits it; what the server says later (`text`) is in
the language that the page has then.
"""

from owl2.serve.errors import ApiError

LANGUAGES = {"en": "English", "zh": "中文"}

# Key: (English, Chinese).
TEXTS: dict[str, tuple[str, str]] = {
    "tab_chat": ("Chat", "对话"),
    "tab_looked": ("Where it looked", "它看了哪里"),
    "tab_settings": ("Settings", "设置"),
    "language": ("Language", "语言"),
    "theme": ("Light or dark", "明亮或黑暗"),
    "welcome": (
        "### Ask about an image\nDrop one here, or several, and write a question. "
        "Or begin with one of these:",
        "### 就图片提问\n把一张或几张图片拖到这里，写下你的问题。也可以从下面的例子开始：",
    ),
    "chat": ("Conversation", "对话"),
    "question": ("Ask about an image …", "就图片提问……"),
    "again": ("↻ Answer again", "↻ 重新回答"),
    "clear": ("＋ New conversation", "＋ 新对话"),
    "look": ("◎ Where did it look?", "◎ 它看了哪里？"),
    "max_new_tokens": ("Longest answer", "回答的最大长度"),
    "max_new_tokens_info": (
        "In tokens: an English word is about one and a half.",
        "以词元计：一个汉字大约是一到两个词元。",
    ),
    "temperature": ("Temperature", "温度"),
    "temperature_info": (
        "0: always the likeliest word, so the same question has the same answer. "
        "Above: answers vary.",
        "0：总是选最可能的词，同样的问题得到同样的回答。大于 0：回答会有变化。",
    ),
    "top_p": ("Top p", "Top p"),
    "top_p_info": (
        "Choose only among the likeliest words that together have this probability.",
        "只在累计概率达到此值的最可能的词中选择。",
    ),
    "seed": ("Seed", "随机种子"),
    "seed_info": (
        "With a temperature above 0: the same seed, the same answer. Empty: a new one each time.",
        "温度大于 0 时：种子相同，回答相同。留空：每次都不同。",
    ),
    "looked_help": (
        "Ask about an image first. Then it is painted here, with how much of each part is behind "
        "the answer, or behind one of its words.",
        "请先就图片提问。然后这里的图片上会用颜色标出：整个回答、或其中某个词，"
        "在多大程度上来自图片的每个部分。",
    ),
    "words": ("Behind which words?", "看哪个词？"),
    "all_words": ("the whole answer", "整个回答"),
    "figure_image": ("The image", "图片"),
    "figure_images": ("Image {number}", "图片 {number}"),
    "figure_looked": ("Where it looked", "它看了哪里"),
    "less": ("an even share", "平均"),
    "more": ("{times} times that", "平均的 {times} 倍"),
    "shares": ("What it looked at when it wrote this", "写出这些词时它在看什么"),
    "share_text": ("the words before", "前面的文字"),
    "share_answer": ("its own answer", "它自己的回答"),
    "sign_in": ("Any name, and an API key as the password.", "用户名任意，密码为 API 密钥。"),
    "cut": ("(cut at the longest answer; see Settings)", "（已达到最大长度，见“设置”）"),
    "stopped": ("(stopped)", "（已停止）"),
    "empty": ("(the model had no answer)", "（模型没有给出回答）"),
    "error_empty": ("Write a question first.", "请先写下问题。"),
    "error_seed": (
        "The seed must be a whole number of at most 9 digits, or empty.",
        "随机种子必须是不超过 9 位的整数，或留空。",
    ),
    "error_no_image": (
        "No question here has an image: there is nothing to look at.",
        "这里的问题没有图片，没有可看的内容。",
    ),
    "error_no_answer": ("Ask something first.", "请先提问。"),
    "error_busy": ("The answer is still being written.", "回答还没有写完。"),
    "error_file_gone": (
        "The file “{name}” is no longer there; add it again.",
        "文件“{name}”已不存在，请重新添加。",
    ),
    "error_in_file": ("{name}: {error}", "{name}：{error}"),
    "error_500": (
        "Something went wrong in the server; its log says what.",
        "服务器出错了，详情见其日志。",
    ),
}


# Of errors with these codes the Chinese page says this, the English one the error's own message.
CHINESE_ERRORS = {
    "too_many_images": "这个对话里的图片太多了。",
    "invalid_image": "这不是能读取的图片，或者文件已损坏。",
    "image_too_large": "这张图片太大了。",
    "too_many_messages": "这个对话太长了，请开始新对话。",
    "context_length_exceeded": "文字太长了，请缩短问题或开始新对话。",
    "rate_limit_exceeded": "服务器正忙，请稍后再试。",
    "timeout": "回答未能在规定时间内完成。",
    "shutting_down": "服务器正在关闭。",
}


def text(key: str, language: str, **values: object) -> str:
    """The words of a key; English for a language that is not there."""
    english, chinese = TEXTS[key]
    return (chinese if language == "zh" else english).format(**values)


def translations() -> dict[str, dict[str, str]]:
    """Per locale of a browser, all keys. Any Chinese is better read than English."""
    english = {key: words[0] for key, words in TEXTS.items()}
    chinese = {key: words[1] for key, words in TEXTS.items()}
    return {"en": english} | dict.fromkeys(("zh", "zh-CN", "zh-TW"), chinese)


def error_text(error: ApiError, language: str) -> str:
    """What the page says of an error."""
    if error.status >= 500 and error.code is None:
        return text("error_500", language)
    if language == "zh" and error.code in CHINESE_ERRORS:
        return CHINESE_ERRORS[error.code]
    return error.message
