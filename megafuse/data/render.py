"""A conversation to text, by the chat template of a tokenizer: within seconds, or not at all."""

import signal
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from megafuse.errors import ConfigError, DataError

Messages = Sequence[Mapping[str, str]]
RENDER_SECONDS = 5.0


@contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    """Raise TimeoutError in the block once it took so long. Without effect outside of the main thread.

    An alarm that was set before goes on to count.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: Any) -> None:
        raise TimeoutError(f"it did not end within {seconds:g} s")

    handler, start = signal.signal(signal.SIGALRM, stop), time.monotonic()
    earlier, interval = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
        if earlier:
            signal.setitimer(signal.ITIMER_REAL, max(earlier - (time.monotonic() - start), 1e-3), interval)


def folded(messages: Messages) -> Messages:
    """The conversation with a leading system message at the beginning of the first user message."""
    first, *rest = messages
    if first["role"] != "system" or not rest or rest[0]["role"] != "user":
        return messages
    text = "\n\n".join(filter(None, (first["content"], rest[0]["content"])))
    return [{**rest[0], "content": text}, *rest[1:]]


def render(tokenizer: Any, messages: Messages, *, generate: bool, kwargs: Mapping[str, Any] | None = None) -> str:
    """The text of a conversation; `generate`: with what the template writes before an answer.

    Raises:
        DataError: the template fails, whatever it raises.
        ConfigError: it takes longer than RENDER_SECONDS: with thousands of such conversations to come, that is the end.
    """
    try:
        with _time_limit(RENDER_SECONDS):
            text = tokenizer.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=generate, **(kwargs or {})
            )
    except TimeoutError as e:
        begin = messages[0]["content"][:60]
        raise ConfigError(
            f"the chat template loops: {e}, for the conversation that begins with {begin!r}. Repair it, or give another"
        ) from None
    except Exception as e:  # a template can raise anything: 1 / 0, a missing key, endless recursion
        told = str(e) if type(e).__name__ == "TemplateError" else f"{type(e).__name__}: {e}"
        hint = ""
        if messages[0]["role"] == "system":
            hint = '; where it knows no system role, set system_messages = "first_user_turn"'
        raise DataError(f"the chat template refuses this conversation: {told}{hint}") from None
    assert isinstance(text, str)
    return text
