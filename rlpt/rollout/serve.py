"""`python -m rlpt.rollout.serve`: one engine process. The specification comes on the first line of stdin, the address
goes out on the first line of stdout; the end of stdin is the end of the process.

So a trainer that dies in whatever way takes its engines along: its end of the pipe closes, and on Linux the kernel
sends a signal besides.
"""

import ctypes
import json
import os
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Callable
from typing import Any

from rlpt.exits import FAULT, USER_MISTAKE
from rlpt.rollout.server import Server, listen
from rlpt.rollout.wire import EngineSpec
from rlpt_data.strict import UserError

TOKEN = "RLPT_ENGINE_TOKEN"
"""Variable of the environment that holds the token of the run; arguments can be read by other users."""
_PR_SET_PDEATHSIG = 1


def main() -> None:
    """Load, listen, serve. A mistake in the specification is one line of JSON and exit code 2."""
    first = json.loads(sys.stdin.readline())
    _end_with(int(first["parent"]))
    said = os.dup(1)
    # What libraries print belongs to the log; stdout carries the address alone.
    os.dup2(2, 1)
    try:
        spec = EngineSpec.model_validate_json(json.dumps(first["spec"]))
        serve(spec, first["host"], first["port"], lambda address: _say(said, {"address": address}))
        # What libraries do when an interpreter ends takes seconds, and nobody needs it.
        os._exit(0)
    except UserError as error:
        _say(said, {"error": str(error)})
        sys.exit(USER_MISTAKE)
    except Exception as error:
        _say(said, {"error": f"{type(error).__name__}: {error}"})
        # For the log: what ends with SystemExit ends without one.
        traceback.print_exc()
        sys.exit(FAULT)


def serve(spec: EngineSpec, host: str, port: int, started: Callable[[str], None]) -> None:
    """Until a signal comes or the engine fails. Raises UserError where the port is taken."""
    from rlpt.rollout.vllm_engine import VLLMBackend, check_model

    check_port(host, port)
    check_model(spec)
    backend = VLLMBackend(spec)
    server = Server(backend, os.environ[TOKEN])
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda _number, _frame: server.stop())
    http = listen(server, host, port)
    started(f"http://{host}:{http.server_address[1]}")
    try:
        server.run()
    finally:
        http.shutdown()
        backend.close()


def check_port(host: str, port: int) -> None:
    """Before the seconds of loading. Raises UserError where nobody could listen there."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise UserError(
                f"engine: cannot listen on {host}:{port}: {error}; choose another --port"
            ) from error


def _end_with(parent: int) -> None:
    """Die when the parent does, however it does."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(FAULT)
    threading.Thread(target=_until_stdin_ends, name="parent", daemon=True).start()


def _until_stdin_ends() -> None:
    # Not through sys.stdin: a thread that holds its lock when the interpreter ends is a crash.
    while os.read(0, 4096):
        pass
    os._exit(0)


def _say(descriptor: int, table: dict[str, Any]) -> None:
    os.write(descriptor, (json.dumps(table) + "\n").encode())


if __name__ == "__main__":
    main()
