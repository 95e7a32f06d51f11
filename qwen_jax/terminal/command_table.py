"""The commands of a chat: how each is spelled, and what `:help` says of it in two languages."""

from typing import NamedTuple


class Command(NamedTuple):
    """A command of a chat.

    name: its long form without the colon; the session's method has the same name, with `_`.
    forms: all forms as they are typed, with what follows.
    english, chinese: what it does.
    others: its further forms, without the colon.
    """

    name: str
    forms: str
    english: str
    chinese: str
    others: tuple[str, ...] = ()


COMMANDS = (
    Command("help", ":help :h", "show this help", "显示帮助", ("h",)),
    Command("exit", ":exit :quit :q", "end", "退出", ("quit", "q")),
    Command("clear", ":clear :cl", "clear the screen", "清屏", ("cl",)),
    Command("clear-his", ":clear-his :clh", "forget the conversation", "清除对话历史", ("clh",)),
    Command("history", ":history :his", "show the conversation", "显示对话历史", ("his",)),
    Command("seed", ":seed", "show the random seed", "显示随机种子"),
    Command("seed", ":seed N", "set the random seed", "设置随机种子"),
    Command("conf", ":conf", "show the generation settings", "显示生成配置"),
    Command("conf", ":conf NAME=VALUE ...", "change generation settings", "修改生成配置"),
    Command("reset-conf", ":reset-conf", "restore the settings of the start", "恢复初始生成配置"),
    Command("system", ":system", "show the system message", "显示系统消息"),
    Command("system", ":system TEXT", 'set it; "" is an empty one', '设置系统消息，"" 为空'),
    Command("retry", ":retry", "ask again, with another seed", "换一个随机种子重新回答"),
    Command("undo", ":undo", "drop the last question and reply", "撤销上一轮对话"),
    Command("save", ":save FILE", "write the conversation, as JSON", "保存对话（JSON）"),
    Command("save!", ":save! FILE", "the same, replacing FILE", "保存对话，覆盖已有文件"),
    Command("load", ":load FILE", "read a conversation", "读取对话"),
    Command("tokens", ":tokens", "count the conversation's tokens", "显示对话的 token 数"),
)
_KEYS = (
    ("Esc Enter", "a new line; so does \\ at the end of one", "换行；行末的 \\ 也可换行"),
    ("Ctrl-C", "stop the reply, and drop its question; twice: at once", "停止回答，不保留本轮"),
    ("Ctrl-D", "end", "退出"),
)
# The command that each word after a colon names.
BY_WORD = {word: one.name for one in COMMANDS for word in (one.name, *one.others)}


def split(text: str) -> tuple[str, str] | None:
    """Return the command's name and what follows it; None for a question.

    White space may stand after the colon. A word that names no command is part of a question.
    """
    if not text.startswith(":"):
        return None
    word, *rest = text[1:].split(maxsplit=1) or [""]
    name = BY_WORD.get(word)
    return None if name is None else (name, rest[0].strip() if rest else "")


def unquoted(text: str) -> str:
    """Return text without the quotation marks around all of it, if there are any."""
    quoted = len(text) > 1 and text[0] == text[-1] and text[0] in "\"'"
    return text[1:-1] if quoted else text


def help_text() -> str:
    """Return the table of commands and keys, in English and Chinese."""
    rows = [(one.forms, one.english, one.chinese) for one in COMMANDS]
    lines = [
        "Commands / 命令",
        *(f"  {forms:23}{english:36}{chinese}" for forms, english, chinese in rows),
        "Keys / 按键",
        *(f"  {key:11}{english:56}{chinese}" for key, english, chinese in _KEYS),
        "Anything else is a question / 其他输入均为提问",
    ]
    return "\n".join(lines)
