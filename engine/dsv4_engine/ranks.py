"""Several processes that compute one model together: who this one is, what is its share, and the sums between them.

Heads and expert sets are divided (tensor and expert parallelism); the cache, norms, mHC, indexer and embedding are
whole everywhere, because one kv head serves all query heads.  Two sums a layer: after attention's output projection and
after the experts.  Every process gets the same sum, so that all of them route and choose alike.  Knows neither the
model nor the command line; following.py keeps the processes in step.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .config import ModelConfig
from .errors import DeviceError

BLOCK = 128  # rows and columns of quantised matrices are divided between their scale blocks


@dataclass(frozen=True)
class Ranks:
    """This process' place among ``count``, of which ``beside`` run on this machine; rank 0 leads."""

    rank: int = 0
    count: int = 1
    beside: int = 1

    @property
    def leads(self) -> bool:
        """Whether other processes follow this one."""
        return self.count > 1 and self.rank == 0

    def device(self, name: str) -> str:
        """``name`` for this process: of several on one machine each takes the GPU of its own number."""
        return f"cuda:{os.environ.get('LOCAL_RANK', self.rank)}" if self.count > 1 and name == "cuda" else name

    def share(self, total: int, step: int = 1) -> tuple[int, int]:
        """[start, end) of this process' part of ``total``, a multiple of ``step``, in whole steps; may be empty."""
        steps = total // step
        return steps * self.rank // self.count * step, steps * (self.rank + 1) // self.count * step

    def hidden_step(self, config: ModelConfig) -> int:
        """The steps in which an expert's hidden channels are divided: the activations' rounding blocks, if they fit."""
        return BLOCK if config.moe_intermediate_size % BLOCK == 0 else 1

    def sum(self, x: Tensor) -> Tensor:
        """The sum of all processes' ``x`` (same shape and dtype), the same bits everywhere; x may be overwritten."""
        if self.count > 1:
            dist.all_reduce(x)
        return x

    def from_leader(self, value: Any) -> Any:
        """Rank 0's ``value`` (picklable), on every process."""
        box = [value]
        if self.count > 1:
            dist.broadcast_object_list(box, src=0, device=torch.device("cpu") if _speaks_cpu() else None)
        return box[0]

    def tensor_from_leader(self, x: Tensor) -> Tensor:
        """Fills ``x`` with rank 0's values."""
        if self.count > 1:
            dist.broadcast(x, src=0)
        return x

    def check(self, config: ModelConfig, quantised: bool) -> None:
        """Raises DeviceError where the model cannot be divided among so many processes.

        quantised: wo_b is; a process' part of its inputs then is rounded in whole blocks.
        """
        if config.o_groups % self.count:
            fitting = [str(n) for n in range(1, config.o_groups + 1) if config.o_groups % n == 0]
            raise DeviceError(
                f"{self.count} processes cannot share {config.o_groups} groups of attention heads evenly",
                f"Start {', '.join(fitting[:-1])} or {fitting[-1]} of them.",
            )
        if quantised and self.count > 1 and config.o_groups // self.count * config.o_lora_rank % BLOCK:
            raise DeviceError(
                f"o_lora_rank={config.o_lora_rank} cannot be divided among {self.count} processes in blocks of {BLOCK}",
                "Run it in one process.",
            )


ALONE = Ranks()


def _speaks_cpu() -> bool:
    return "gloo" in str(dist.get_backend_config())


def launched() -> Ranks:
    """What torchrun says in the environment: ALONE outside it.  Imports and connects nothing."""
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1 or "RANK" not in os.environ:  # cluster managers set the one without the other
        return ALONE
    return Ranks(int(os.environ["RANK"]), count, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def join(ranks: Ranks) -> None:
    """Connect to the other processes, once; does nothing alone.  NCCL carries GPU tensors, gloo the CPU's."""
    if ranks.count > 1 and not dist.is_initialized():
        cuda = torch.cuda.is_available() and dist.is_nccl_available()
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", rank=ranks.rank, world_size=ranks.count)


def leave() -> None:
    """Disconnect, where connected."""
    if dist.is_initialized():
        dist.destroy_process_group()
