"""Exponential moving average of the parameters, in CPU memory, beside the training.

After each optimizer step a thread computes ``average = decay * average + (1 - decay) * parameter``, for this rank's
shards alone, while the next forward and backward passes run; ranks exchange nothing. On a CPU the thread reads the
parameters themselves, which do not change before the next optimizer step. From a GPU a stream of its own copies them
into page-locked memory first, and only the GPU's next optimizer step waits for that copy.

Source: DeepSeek-V3, arXiv 2412.19437, section 3.2.3.
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor

import torch
from composer.core import Callback, State
from composer.loggers import Logger
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from moefoundry.callbacks.health import step_was_skipped
from moefoundry.config import EmaConfig


class ParameterAverage:
    """fp32 averages of tensors, starting as copies of them; at most one update is under way.

    Args:
        tensors: fp32, all on one device.
        decay: Weight of the average in each update, between 0 and 1.

    Attributes:
        values: Averages on the CPU, fp32, one of the same shape for each tensor; to be read after :meth:`wait`.
    """

    def __init__(self, tensors: list[Tensor], decay: float) -> None:
        self.values = [tensor.to("cpu", copy=True) for tensor in tensors]
        self._weight = 1 - decay
        self._staging = _Staging(tensors) if tensors[0].is_cuda else None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="ema")
        self._update: Future[None] | None = None
        if self._staging is None:  # a second team on the cores of the training would slow both down for good
            threads = torch.get_num_threads()
            self._thread.submit(_work_alone).result()
            torch.set_num_threads(threads)  # for threads that begin later, too

    def update(self, tensors: list[Tensor]) -> None:
        """Begin to average ``tensors`` in, as they are now; :meth:`release` comes before they change."""
        self.wait()
        if self._staging is not None:
            self._staging.copy(tensors)
        self._update = self._thread.submit(self._move, tensors)

    def release(self) -> None:
        """Let the tensors change from here on: wait until the update under way has read them."""
        if self._staging is None:
            self.wait()
        else:
            torch.cuda.current_stream().wait_event(self._staging.copied)

    def wait(self) -> None:
        """Wait until the update under way has ended.

        Raises:
            Exception: The update ended with it.
        """
        update, self._update = self._update, None
        if update is not None:
            update.result()

    def restart(self, tensors: list[Tensor]) -> None:
        """Make the averages copies of ``tensors``, as at the beginning."""
        self.wait()
        for value, tensor in zip(self.values, tensors, strict=True):
            value.copy_(tensor)

    def exchange(self, tensors: list[Tensor]) -> None:
        """Swap averages and ``tensors``, bit for bit; doing it twice leaves all as it was."""
        self.wait()
        for value, tensor in zip(self.values, tensors, strict=True):
            kept = tensor.clone()
            tensor.copy_(value)
            value.copy_(kept)

    def close(self) -> None:
        """End the thread, after the update under way."""
        self._thread.shutdown()

    def _move(self, tensors: list[Tensor]) -> None:
        if self._staging is not None:
            self._staging.wait()
            tensors = self._staging.copies
        # One pass over memory, and one call: the interpreter is free for the training meanwhile.
        torch._foreach_lerp_(self.values, tensors, self._weight)


def _work_alone() -> None:
    """Let the operators of this thread have no other threads."""
    torch.get_num_threads()  # the number for all threads comes first: it is set when a thread first asks
    torch.set_num_threads(1)


class _Staging:
    """Copies of a GPU's tensors in page-locked memory, always the same.

    Attributes:
        copies: The tensors as they were when :meth:`copy` was called, once ``copied`` is reached.
        copied: Event on the stream that copies.
    """

    def __init__(self, tensors: list[Tensor]) -> None:
        self.copies = [torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True) for tensor in tensors]
        self.copied = torch.cuda.Event(blocking=True)
        self._device = tensors[0].device
        self._stream = torch.cuda.Stream()

    def copy(self, tensors: list[Tensor]) -> None:
        """Begin to copy what the current stream leaves in ``tensors``."""
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            for copy, tensor in zip(self.copies, tensors, strict=True):
                copy.copy_(tensor, non_blocking=True)
            self.copied.record()

    def wait(self) -> None:
        """Wait for the copies, in any thread: a new one has the first GPU, and would take memory of it."""
        with torch.cuda.device(self._device):
            self.copied.synchronize()


class Ema(Callback):
    """Averages the parameters that train; buffers are not averaged.

    The averages begin as the initial or loaded parameters, or as the averages of the checkpoint that the run begins
    with. With ``evaluate``, they take the place of the parameters during evaluation.
    """

    def __init__(self, cfg: EmaConfig) -> None:
        self.cfg = cfg

    def init(self, state: State, logger: Logger) -> None:
        named = state.model.named_parameters(remove_duplicate=False)
        self._names: dict[str, nn.Parameter] = {name: parameter for name, parameter in named if parameter.requires_grad}
        self._parameters = list(dict.fromkeys(self._names.values()))  # tied ones once
        self._average = ParameterAverage(self._shards(), self.cfg.decay)

    def after_train_batch(self, state: State, logger: Logger) -> None:
        self._average.release()

    def batch_end(self, state: State, logger: Logger) -> None:
        if not step_was_skipped(state.model):
            self._average.update(self._shards())

    def eval_before_all(self, state: State, logger: Logger) -> None:
        if self.cfg.evaluate:
            self._exchange(state.model)

    def eval_after_all(self, state: State, logger: Logger) -> None:
        if self.cfg.evaluate:
            self._exchange(state.model)

    def close(self, state: State, logger: Logger) -> None:
        self._average.close()

    def tensors(self) -> dict[str, Tensor]:
        """Map ``ema/{parameter}`` to its average, on the CPU, sharded like it, to be read until the next batch ends."""
        self._average.wait()
        averages = dict(zip(self._parameters, self._average.values, strict=True))
        return {f"ema/{name}": _sharded_like(parameter, averages[parameter]) for name, parameter in self._names.items()}

    def restart(self) -> None:
        """Begin anew with the parameters as they are."""
        self._average.restart(self._shards())

    @torch.no_grad()
    def _shards(self) -> list[Tensor]:
        """List this rank's shard of every parameter, sharing memory with it."""
        return [p.to_local() if isinstance(p, DTensor) else p.detach() for p in self._parameters]

    def _exchange(self, model: nn.Module) -> None:
        self._average.exchange(self._shards())
        for module in model.modules():  # FSDP may have left the root unit gathered, with what the shards were
            if isinstance(module, FSDPModule):
                module.reshard()


def _sharded_like(parameter: nn.Parameter, shard: Tensor) -> Tensor:
    """Make ``shard`` a DTensor on the CPU; ``DTensor.from_local`` would move it to the mesh's device."""
    return DTensor(shard, parameter._spec, requires_grad=False) if isinstance(parameter, DTensor) else shard
