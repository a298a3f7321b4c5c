"""Memory of the trainer's GPU, opened by an engine on the same GPU. Not yet run on a GPU.

Handles are plain bytes, not a pickle. The engine copies the bucket out before it answers, so that with the answer the
memory is the trainer's alone again: a loader that keeps a tensor for later cannot see it change.
"""

import torch
from torch import Tensor

from rlpt.rollout.buckets import DTYPES, Bucket, TransferError
from rlpt.rollout.wire import Handle, Header


def shared(payload: Tensor) -> Handle:
    """A handle of a bucket's payload, which must stay as it is until the engine has answered."""
    torch.cuda.synchronize(payload.device)
    _, memory, size, offset, counter, counter_offset, event, event_sync = (
        payload.untyped_storage()._share_cuda_()
    )
    return Handle(
        gpu=_gpu(payload.device), memory=memory.hex(), size=size, offset=offset,
        counter=counter.hex(), counter_offset=counter_offset, event=event.hex(), event_sync=event_sync,
    )  # fmt: skip


def copied(handle: Handle, header: Header) -> Bucket:
    """The bucket behind a handle, in memory of the engine. Raises TransferError on another GPU."""
    index = torch.cuda.current_device()
    if (here := _gpu(torch.device("cuda", index))) != handle.gpu:
        raise TransferError(
            f"the trainer's memory is on GPU {handle.gpu}, the engine runs on {here}; set "
            "engine.vllm.publish = 'directory'"
        )
    storage = torch.UntypedStorage._new_shared_cuda(
        index, bytes.fromhex(handle.memory), handle.size, handle.offset,
        bytes.fromhex(handle.counter), handle.counter_offset, bytes.fromhex(handle.event), handle.event_sync,
    )  # fmt: skip
    held = torch.empty(0, dtype=DTYPES[header.dtype], device=storage.device).set_(storage)
    own = held.clone()
    torch.cuda.synchronize(index)
    return Bucket(header, own)


def released() -> None:
    """The trainer's allocator takes back what engines have closed."""
    torch.cuda.ipc_collect()


def _gpu(device: torch.device) -> str:
    """The same in both processes, whatever CUDA_VISIBLE_DEVICES makes of its number."""
    return str(torch.cuda.get_device_properties(device).uuid)
