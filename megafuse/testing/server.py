"""A small OpenAI-compatible server, for tests: real HTTP, in a thread, gone at the end."""

import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any

Answer = Callable[[dict[str, Any]], Any]


class ChatServer:
    """Serves `/v1/chat/completions`; a context manager.

    Args:
        answer: the text for a request body, or a whole `choices` entry as a dict; an exception becomes status 400.
        failures: so many first requests get status 503.
        host: address to listen at; the loopback interface's, or one that other network namespaces reach.
    """

    def __init__(self, answer: Answer, failures: int = 0, host: str = "127.0.0.1") -> None:
        self.requests = 0
        lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    outer.requests += 1
                    refuse = outer.requests <= failures
                if refuse or self.path != "/v1/chat/completions":
                    return self._send(503 if refuse else 404, {"error": "busy" if refuse else "no such path"})
                try:
                    found = answer(body)
                except Exception as e:
                    return self._send(400, {"error": str(e)})
                choice = found if isinstance(found, dict) else {"message": {"content": found}, "finish_reason": "stop"}
                self._send(200, {"choices": [choice], "usage": {"completion_tokens": 3}})

            def _send(self, status: int, reply: dict[str, Any]) -> None:
                data = json.dumps(reply).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, format: str, *args: Any) -> None:
                """Say nothing."""

        self._server = ThreadingHTTPServer((host, 0), Handler)
        self.url = f"http://{host}:{self._server.server_address[1]}/v1"
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)

    def __enter__(self) -> "ChatServer":
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(10)
