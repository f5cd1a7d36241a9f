"""Scaling out: BatchNorm over all processes, parameters shared out, data in shards."""

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard


def process_count() -> int:
    """Return how many processes train together; 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


class SumOverProcesses(torch.autograd.Function):
    """The sum of a tensor over all processes, which each of them gets.

    A value enters the sums of all processes, so its gradient is the sum of theirs. (torch's own
    differentiable all-reduce is deprecated.)
    """

    @staticmethod
    def forward(ctx: object, tensor: Tensor) -> Tensor:
        """Return the sum; every process must call this."""
        total = tensor.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> Tensor:
        """Return the sum of the gradients."""
        return SumOverProcesses.apply(gradient)


def joint_statistics(maps: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return mean and variance (C,) of maps (B, C, H, W) over all processes, and their count.

    One message carries all: from each process its count, and per channel the sum and the sum of
    squares, in 64 bits, because the variance is a small difference of two large numbers.
    """
    variance, mean = torch.var_mean(maps, (0, 2, 3), correction=0)
    variance, mean = variance.double(), mean.double()
    count = mean.new_tensor([maps.numel() / maps.shape[1]])
    own = torch.cat([count, count * mean, count * (variance + mean**2)])
    count, total, squares = SumOverProcesses.apply(own).split([1, len(mean), len(mean)])
    mean = total / count
    variance = squares / count - mean**2
    return mean.to(maps.dtype), variance.to(maps.dtype), count


class SyncedBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm whose batch is that of all processes; torch's `SyncBatchNorm` refuses the CPU.

    In eval mode, and with one process, it is `nn.BatchNorm2d`.
    """

    def forward(self, maps: Tensor) -> Tensor:
        """Normalise maps (B, C, H, W), each process its own."""
        if not self.training or process_count() == 1:
            return super().forward(maps)
        precise = maps.to(self.weight.dtype)  # autocast gives 16 bits
        mean, variance, count = joint_statistics(precise)
        with torch.no_grad():
            self.num_batches_tracked += 1
            unbiased = variance * (count / (count - 1)).to(variance.dtype)
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(unbiased, self.momentum)
        scale = self.weight * (variance + self.eps).rsqrt()
        scaled = (precise - mean[:, None, None]) * scale[:, None, None]
        return (scaled + self.bias[:, None, None]).to(maps.dtype)


def synchronize_norms(model: nn.Module) -> nn.Module:
    """Let each BatchNorm of a model see the batches of all processes; state dicts stay the same.

    On a GPU it is torch's `SyncBatchNorm`, so move the model there first.
    """
    if next(model.parameters()).is_cuda:
        return nn.SyncBatchNorm.convert_sync_batchnorm(model)
    for part in model.modules():
        if type(part) is nn.BatchNorm2d:
            part.__class__ = SyncedBatchNorm2d
    return model


def shard_parameters(model: nn.Module) -> nn.Module:
    """Share out a model's parameters among all processes (FSDP); each holds a part of each.

    A block's parameters are put together before it runs and given back afterwards. The model is
    changed in place; the optimizer must be built from it afterwards.
    """
    for block in model.blocks:
        fully_shard(block)
    return fully_shard(model)
