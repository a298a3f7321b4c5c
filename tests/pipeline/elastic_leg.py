"""A part of a run, under torchrun or alone: ends behind its checkpoint of a step. elastic_leg.py STEP TOML KEY=VALUE...

Step 0: to the end of the run.
"""

import sys
from pathlib import Path

from rlpt import session
from rlpt.config import RunConfig
from rlpt.train import run
from rlpt_data.strict import load


def main(step: int, toml: Path, words: list[str]) -> None:
    save = session.Session.save

    def ended(self, progress, work) -> None:
        save(self, progress, work)
        if progress.step == step:
            self.settle()
            raise SystemExit(0)

    session.Session.save = ended
    run(load(RunConfig, toml, words))


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
