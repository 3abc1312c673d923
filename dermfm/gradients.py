"""The gradient's norm, in all and by part of the model, agreed over ranks before the optimizer step; steps discarded.

DeepSpeed computes one norm a parameter group at stages 1 to 3, all-reduces it, and skips the step (and clears every
gradient that it holds) where one is not finite. This listens to those norms, so they cost nothing more, and can ask for
the same skip. At stage 1 in float32 in host memory the step is `dermfm.shares`', and gradients are measured and clipped
here. At stage 0 there is no place to listen: in float32 they are averaged, measured and clipped here, too, one flat
tensor a parameter group; DeepSpeed would copy them twice and read them three times more. In other precisions norms are
taken of what it has averaged.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dermfm.shares import Shares, is_for, square

INVALID = -1.0  # DeepSpeed's mark of a norm that is not finite


@dataclass(frozen=True)
class Update:
    """What became of a step: gradient norm before clipping, also by part; whether the weights were changed."""

    norm: float
    parts: dict[str, float]
    applied: bool

    def named(self) -> dict[str, float]:
        """As scalars of a log row."""
        return {"grad_norm": self.norm, **{f"grad_norm/{part}": norm for part, norm in self.parts.items()}}


class Gradients:
    """The gradients of a DeepSpeed engine. Make one, once, before the first step."""

    def __init__(self, engine: Any) -> None:
        self._engine, self._discard = engine, False
        self._norms: list[Tensor] = []
        optimizer = engine.optimizer
        if is_for(optimizer):
            self._shares, self._share = Shares(optimizer), torch.empty(0)
            optimizer.reduce_gradients = self._sum_and_clip
            optimizer.step = self._unless_bad(self._step_on_share)
        elif hasattr(optimizer, "get_grad_norm_direct"):
            direct, offloaded = optimizer.get_grad_norm_direct, optimizer.complete_grad_norm_calculation_for_cpu_offload
            optimizer.get_grad_norm_direct = self._listen(lambda grads, params: direct(_as_norms(grads), params))
            optimizer.complete_grad_norm_calculation_for_cpu_offload = self._listen(offloaded)
        else:
            if isinstance(optimizer, torch.optim.Optimizer):  # float32: gradients lie at the parameters
                engine.allreduce_gradients, engine.clip_fp32_gradients = self._average_and_clip, lambda: None
            else:
                engine.allreduce_gradients = self._after(engine.allreduce_gradients)
            optimizer.step = self._unless_bad(optimizer.step)

    def step(self, discard: bool = False) -> Update:
        """The optimizer step; none where `discard` or where the norm is not finite. Clears gradients. Collective."""
        self._discard, self._norms = discard, []
        scale = float(getattr(self._engine.optimizer, "loss_scale", 1.0) or 1.0)
        self._engine.step()
        norms = torch.stack([n.detach().float().reshape(()) for n in self._norms]).tolist() if self._norms else []
        squares: dict[str, float] = {}
        for part, norm in zip(self._parts(), norms, strict=False):
            value = math.nan if norm < 0 else norm / scale
            squares[part] = squares.get(part, 0.0) + value * value
        parts = {part: math.sqrt(value) for part, value in squares.items()}
        total = math.sqrt(sum(squares.values())) if squares else self._told_norm()
        return Update(total, parts, not self._is_bad(norms) and bool(self._engine.was_step_applied()))

    def _told_norm(self) -> float:
        norm = self._engine.get_global_grad_norm()
        return math.nan if norm is None else float(norm)

    def _is_bad(self, norms: list[float]) -> bool:
        return self._discard or not all(math.isfinite(n) and n >= 0 for n in norms)

    def _parts(self) -> list[str]:
        """The part of the model that each norm belongs to, in the order in which they come."""
        optimizer = self._engine.optimizer
        groups = [part_of(group) for group in optimizer.param_groups]
        of_norm = getattr(optimizer, "sub_group_to_group_id", None)  # stage 3 cuts groups into pieces
        return [groups[of_norm[i]] for i in range(len(of_norm))] if of_norm else groups

    def _listen(self, norm_of: Callable[..., Any]) -> Callable[..., Any]:
        def norm(*arguments: Any, **named: Any) -> Any:
            found = norm_of(*arguments, **named)
            found = found if isinstance(found, Tensor) else torch.tensor(float(found))
            self._norms.append(found)
            return torch.full_like(found, INVALID) if self._discard else found

        return norm

    def _after(self, reduce: Callable[..., Any]) -> Callable[..., Any]:
        def reduced(*arguments: Any, **named: Any) -> None:
            reduce(*arguments, **named)
            if not self._engine.is_gradient_accumulation_boundary():
                return
            for group in self._engine.optimizer.param_groups:
                own = [p.grad for p in group["params"] if p.grad is not None]
                if own:
                    self._norms.append(
                        torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g) for g in own]))
                    )

        return reduced

    def _average_and_clip(self, *_: Any, **__: Any) -> None:
        """Stands where DeepSpeed's own reduction and clipping do; leaves gradients as views of the flat tensors."""
        if not self._engine.is_gradient_accumulation_boundary():
            return  # called after every backward pass, too
        flat = [_flat_gradients(group["params"]) for group in self._engine.optimizer.param_groups]
        for sent in [dist.all_reduce(tensor, async_op=True) for tensor in flat]:
            sent.wait()
        self._norms = [torch.linalg.vector_norm(tensor) / dist.get_world_size() for tensor in flat]
        scale = self._scale(torch.stack(self._norms))
        for tensor in flat:
            tensor.mul_(scale)

    def _sum_and_clip(self, *_: Any, **__: Any) -> None:
        """Stands where DeepSpeed's reduction of stage 1 does; keeps this rank's share, clipped."""
        self._share = self._shares.take_sums()
        squares = torch.stack([square(own) for own in self._share.split(self._shares.sizes)])
        dist.all_reduce(squares)  # of all groups at once
        norms = (squares.sqrt() / dist.get_world_size()).float()
        self._share.mul_(self._scale(norms))
        self._norms = list(norms)

    def _step_on_share(self, *_: Any) -> None:
        share, self._share = self._share, torch.empty(0)
        self._shares.step(share)

    def _scale(self, norms: Tensor) -> float:
        """What makes clipped means of sums, from the norms of the means."""
        limit, world = self._engine.gradient_clipping(), dist.get_world_size()
        total = float(torch.linalg.vector_norm(norms))
        return min(limit / (total + 1e-6), 1.0) / world if limit else 1 / world

    def _unless_bad(self, step: Callable[..., Any]) -> Callable[..., Any]:
        def stepped(*arguments: Any, **named: Any) -> Any:
            return None if self._is_bad([float(n) for n in self._norms]) else step(*arguments, **named)

        return stepped


def _as_norms(gradients: list[Tensor]) -> list[Tensor]:
    """Float32 gradients in host memory as numbers of the same norms: DeepSpeed would copy each to float64 first."""
    return [
        torch.dot(g.reshape(-1), g.reshape(-1)).sqrt()
        if g.device.type == "cpu" and g.dtype == torch.float32 and not getattr(g, "_zero_padding", False)
        else g  # also what only fills up the last rank's share: DeepSpeed knows it by a mark
        for g in gradients
    ]


@torch.no_grad()
def _flat_gradients(parameters: list[Tensor]) -> Tensor:
    """All gradients of a group in one tensor, which they are views of from now on. One that is missing is zero."""
    flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).reshape(-1) for p in parameters])
    for p, own in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        p.grad = own.view_as(p)
    return flat


def part_of(group: dict[str, Any]) -> str:
    """The part of the model whose parameters a group holds: its key `part`, else the start of its name."""
    name = str(group.get("part") or group.get("name", "all"))
    return name.split(".")[0].split("_no_decay")[0]
