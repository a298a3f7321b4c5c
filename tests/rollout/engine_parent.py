"""A trainer that starts one engine, says its process id, and ends as it is told or killed.

Run by tests in a process of its own: `engine_parent.py FOLDER [wait | hold | return]`.
hold: another child of it has the engine's stdin, too, so that its end does not come with the trainer's.
"""

import json
import subprocess
import sys
import time
from pathlib import Path

from rlpt.rollout.process import EngineProcess
from rlpt.rollout.wire import EngineSpec


def main(folder: Path, how: str) -> None:
    spec = EngineSpec.model_validate_json((folder / "spec.json").read_text())
    process = EngineProcess(spec, folder / "engine.log", "a token", start_seconds=60)
    process.start()
    process.wait()
    holder = None
    if how == "hold":
        assert process._process
        assert process._process.stdin
        kept = process._process.stdin.fileno()
        holder = subprocess.Popen(["sleep", "60"], pass_fds=[kept], stdout=subprocess.DEVNULL).pid
    print(json.dumps({"pid": process.pid, "holder": holder}), flush=True)
    if how != "return":
        time.sleep(60)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
