"""A STAND-IN for a judge model: a server that speaks the chat protocol and follows a rule of words, no model at all.

Score 1 where at least half of the prediction's words stand among the first words of the reference. For tests and short
runs without a judge; its verdicts say nothing about meaning. `python rule_judge.py PORT` serves it until it is ended.
"""

import json
import re
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

MODEL = "stand-in-rule-of-words"


def rule(question: str) -> str:
    """The verdict of the rule on the question that rlpt asks."""
    texts = {
        name: found
        for name in ("reference", "prediction")
        for found in re.findall(rf"\[\w+ {name}\]\n(.*)\n\[/\w+ {name}\]", question, re.DOTALL)
    }
    said = texts["prediction"].split()
    first = set(texts["reference"].split()[: 2 * len(said)])
    shared = sum(word in first for word in said)
    return f"A rule of words, not a model.\nScore: {int(2 * shared >= len(said))}"


class Server(ThreadingHTTPServer):
    """``answer(question)`` is a text, or a number: a status without an answer."""

    daemon_threads = True

    def __init__(self, answer: Callable[[str], str | int], port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), _Handler)
        self.answer = answer
        self.seen: list[dict[str, Any]] = []
        """What was asked, with the headers that came along."""

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"


class _Handler(BaseHTTPRequestHandler):
    server: Any

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.seen.append({"path": self.path, "headers": dict(self.headers), **body})
        said = self.server.answer(body["messages"][-1]["content"])
        message = {"role": "assistant", "content": said}
        reply = json.dumps({"model": MODEL, "choices": [{"message": message}]}).encode()
        self.send_response(said if isinstance(said, int) else 200)
        self.send_header("Content-Length", str(len(reply)))
        self.end_headers()
        self.wfile.write(reply)

    def log_message(self, format: str, *args: object) -> None:
        """Says nothing."""


@contextmanager
def served(answer: Callable[[str], str | int] = rule) -> Iterator[Server]:
    with Server(answer) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


if __name__ == "__main__":
    with Server(rule, int(sys.argv[1])) as standing_in:
        print(f"a rule of words, no model, at {standing_in.address}", flush=True)
        standing_in.serve_forever()
