"""A process that test_transport.py starts: receive weights from the group of a store, and say what arrived.

group_member.py JOIN DIES_AFTER: one line of JSON, dtype, shape and checksum by name.
"""

import json
import os
import sys

import torch

from rlpt.rollout import wire
from rlpt.rollout.broadcasting import WeightGroup
from rlpt.rollout.checksum import checksum


def received(join: wire.Join, dies_after: int) -> dict:
    group = WeightGroup(join, torch.device("cpu"))
    found = {}
    for bucket in group.received():
        for name, tensor in bucket.tensors():
            found[name] = [str(tensor.dtype), list(tensor.shape), checksum(tensor)]
            if len(found) == dies_after:
                os._exit(0)
    return found


if __name__ == "__main__":
    print(json.dumps(received(wire.Join.model_validate_json(sys.argv[1]), int(sys.argv[2]))))
