"""The inputs of checkpointed layers in host memory: `model.activation_checkpointing: offload`.

Checkpointing keeps one tensor per layer, its input (S, D), and computes the rest again. Here that one is copied to the
host beside the forward and comes back beside the backward; what autograd is given has the same bits.

    forward     layer i + 1 computes              input of layer i -> host
    backward    layer i + 1, again and back       input of layer i -> device

On the device are at most two inputs on their way out and one on its way in, whatever the depth. The device waits for
copies by events, the host for none of them. The graph owns every copy: when it goes, after a backward or an error, they
go. transformers' own offload copies on the stream that computes.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint

_LEAVING = 2  # inputs that stay until their copies are done: the layer computes longer than a copy takes


class Lane(Protocol):
    """How a tensor gets to the host and back. What `wait` takes is the second thing that the other two give."""

    def out(self, x: Tensor) -> tuple[Tensor, Any]:
        """A copy on the host; until `wait`, x has to stay as it is."""

    def back(self, kept: Tensor) -> tuple[Tensor, Any]:
        """A copy on the device, to be read after `wait`."""

    def wait(self, done: Any) -> None:
        """What the device computes from here on comes after that copy."""


class SideStream:
    """Copies between a CUDA device and pinned memory, on a stream of their own.

    What comes back is allocated on that stream, which waits for the computing one before it writes: memory that was
    used there and freed cannot be written too early.
    """

    def __init__(self, device: torch.device):
        self.device, self.stream = device, torch.cuda.Stream(device)

    def out(self, x: Tensor) -> tuple[Tensor, Any]:
        kept = torch.empty_like(x, device="cpu", pin_memory=True)
        with self._after_what_computes():
            kept.copy_(x, non_blocking=True)
        return kept, self.stream.record_event()

    def back(self, kept: Tensor) -> tuple[Tensor, Any]:
        with self._after_what_computes():
            x = kept.to(self.device, non_blocking=True)
        return x, self.stream.record_event()

    def wait(self, done: Any) -> None:
        torch.cuda.current_stream(self.device).wait_event(done)

    def _after_what_computes(self) -> Any:
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        return torch.cuda.stream(self.stream)


class SameMemory:
    """Where the device is the host: a copy each way, done at once."""

    def out(self, x: Tensor) -> tuple[Tensor, Any]:
        return x.clone(), None

    def back(self, kept: Tensor) -> tuple[Tensor, Any]:
        return kept.clone(), None

    def wait(self, done: Any) -> None: ...


class _Input:
    """A saved tensor: still here, on the host, or on its way back."""

    def __init__(self, x: Tensor, lane: Lane, before: _Input | None):
        self.here: Tensor | None = x.detach()
        self.storage = StorageWeakRef(x.untyped_storage())  # no other storage gets its address while this lives
        self.version = x._version
        self.lane = lane
        self.kept, self.done = lane.out(self.here)
        self.before = weakref.ref(before) if before is not None else None  # the backward comes to it next

    def leave(self) -> None:
        """The device gives it up, once it is copied."""
        if self.here is not None:
            if self.here._version != self.version:
                raise RuntimeError("expected a layer's input to stay as it is, found it changed in place")
            self.lane.wait(self.done)
            self.here = None

    def fetch(self) -> None:
        """Begin to bring it back."""
        if self.here is None:
            self.here, self.done = self.lane.back(self.kept)
            self.version = self.here._version

    def take(self) -> Tensor:
        """The tensor; whoever asked has it, and this does not."""
        self.fetch()
        self.lane.wait(self.done)
        x, self.here = self.here, None
        assert x is not None
        return x


class LayerInputs:
    """Those of all checkpointed layers of a model, in the order of its forward. lane: None takes that of the device.

    A tensor that several layers get is copied once. `copied` and `fetched` count bytes.
    """

    def __init__(self, lane: Lane | None = None):
        self.copied = self.fetched = 0
        self._lane = lane
        self._lanes: dict[torch.device, Lane] = {}
        self._known: weakref.WeakValueDictionary[Any, _Input] = weakref.WeakValueDictionary()
        self._leaving: deque[weakref.ref[_Input]] = deque()
        self._last: weakref.ref[_Input] | None = None

    def checkpoint(self, function: Callable[..., Any], *args: Any, **options: Any) -> Any:
        """torch's checkpoint: what it saves within the function is nothing, so the hooks see its inputs alone."""
        with saved_tensors_hooks(self._put, self._get):
            return checkpoint(function, *args, use_reentrant=False, **options)

    def _put(self, x: Tensor) -> Tensor | _Input:
        if not x.is_floating_point():
            return x
        key = x.untyped_storage()._cdata, x.storage_offset(), x.shape, x.stride(), x.dtype, x._version
        found = self._known.get(key)
        if found is None:
            found = _Input(x, self._lane_of(x.device), self._last() if self._last is not None else None)
            self._known[key] = found
            self.copied += found.kept.nbytes
            self._leaving.append(weakref.ref(found))
        self._last = weakref.ref(found)
        while len(self._leaving) > _LEAVING:
            if (one := self._leaving.popleft()()) is not None:
                one.leave()
        return found

    def _get(self, saved: Tensor | _Input) -> Tensor:
        if isinstance(saved, Tensor):
            return saved
        self.fetched += saved.kept.nbytes if saved.here is None else 0
        x = saved.take()
        before = saved.before() if saved.before is not None else None
        if before is not None and before.here is None:
            before.fetch()
            self.fetched += before.kept.nbytes
        return x

    def _lane_of(self, device: torch.device) -> Lane:
        if self._lane is not None:
            return self._lane
        if device not in self._lanes:
            self._lanes[device] = SideStream(device) if device.type == "cuda" else SameMemory()
        return self._lanes[device]


def offload(module: Any, inputs: LayerInputs, **options: Any) -> None:
    """Checkpoint every layer of a transformers model that can be, its input among `inputs`; options of torch's."""
    module.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for layer in module.modules():
        if hasattr(layer, "_gradient_checkpointing_func"):
            layer._gradient_checkpointing_func = partial(inputs.checkpoint, **options)
