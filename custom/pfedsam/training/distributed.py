"""One site on several GPUs or CPU processes: each rank trains a part of every epoch, gradients are averaged."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import Sampler

from pfedsam.data.slices import EpochSampler


def start_processes(backend: str | None = None) -> torch.device:
    """Join the group of processes that `torchrun` started.

    Args:
        backend: by default `nccl` with CUDA, else `gloo`.

    Returns:
        The device of this rank.
    """
    cuda = torch.cuda.is_available()
    if not dist.is_initialized():
        dist.init_process_group(backend or ("nccl" if cuda else "gloo"))
    device = torch.device("cuda", dist.get_rank() % torch.cuda.device_count()) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    return device


class RankSampler(Sampler[int]):
    """The part of an epoch that a rank trains; all parts have the same length.

    Args:
        sampler: of the whole epoch, the same on every rank.
    """

    def __init__(self, sampler: EpochSampler) -> None:
        self.sampler = sampler
        self.rank, self.ranks = dist.get_rank(), dist.get_world_size()

    def __len__(self) -> int:
        return -(-len(self.sampler) // self.ranks)

    def set_draw(self, *draw: int) -> None:
        """See `EpochSampler.set_draw`."""
        self.sampler.set_draw(*draw)

    def __iter__(self) -> Iterator[int]:
        items = list(self.sampler)
        # the first items fill up the last round
        items += items[: len(self) * self.ranks - len(items)]
        return iter(items[self.rank :: self.ranks])


def average_gradients(network: nn.Module) -> None:
    """Average every gradient over the ranks as soon as it is there. For parameters that are trained when it is called.

    The network stays what it is, not wrapped: state, phases and cache work as with one process.
    """

    def average(parameter: Tensor) -> None:
        assert parameter.grad is not None
        dist.all_reduce(parameter.grad)
        parameter.grad /= dist.get_world_size()

    for parameter in network.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(average)
