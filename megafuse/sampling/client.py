"""A client of OpenAI-compatible servers on the standard library: bounded waits, bounded retries, clear refusals."""

import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from typing import Any

from megafuse.errors import ConfigError, MegafuseError

_RETRY = (408, 409, 425, 429, 500, 502, 503, 504)


class ServerError(MegafuseError):
    """A server refused a request, or did not answer, often enough to give up; finished chunks are kept."""


class ChatClient:
    """POSTs to `{base_url}/chat/completions`.

    Args:
        base_url: with its version, for example http://127.0.0.1:8000/v1.
        api_key_env: environment variable that holds the key; none is sent where it is not set.
        timeout: seconds for one request.
        retries: after a refusal that may pass, or no connection; the waits double from half a second.
    """

    def __init__(self, base_url: str, *, api_key_env: str, timeout: float, retries: int) -> None:
        if not base_url.startswith(("http://", "https://")):
            raise ConfigError(f"base_url = {base_url!r} must start with http:// or https://")
        self.url = f"{base_url.rstrip('/')}/chat/completions"
        self.timeout, self.retries = timeout, retries
        self._key = os.environ.get(api_key_env, "")

    def complete(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """The server's answer to one request.

        Raises:
            ServerError: with the status and what the server says.
        """
        headers = {"Content-Type": "application/json"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        problem = ""
        for attempt in range(self.retries + 1):
            if attempt:
                time.sleep(0.5 * 2 ** (attempt - 1))
            request = urllib.request.Request(self.url, json.dumps(body).encode(), headers)
            try:
                with urllib.request.urlopen(request, timeout=self.timeout) as reply:
                    answer = json.loads(reply.read())
                if isinstance(answer, dict) and answer.get("choices"):
                    return answer
                problem = f"an answer without choices: {answer!r:.200}"
            except urllib.error.HTTPError as e:
                problem = f"HTTP {e.code}: {e.read()[:500].decode(errors='replace')}"
                if e.code not in _RETRY:
                    break
            except (OSError, ValueError) as e:  # refused, reset, timed out; no JSON
                problem = f"{type(e).__name__}: {e}"
        raise ServerError(f"{self.url}: {problem}")
