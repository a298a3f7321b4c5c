"""A trainer that starts one engine, says its process id and address, and ends as it is told or killed.

Run by tests in a process of its own: `engine_parent.py FOLDER [wait | return]`.
"""

import json
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
    print(json.dumps({"pid": process.pid, "address": process.address}), flush=True)
    if how == "wait":
        time.sleep(60)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
