"""Batch normalisation to group normalisation."""

from __future__ import annotations

import copy

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


def to_groupnorm(model: nn.Module, groups: int = 16) -> nn.Module:
    """A copy of ``model`` with a GroupNorm for each BatchNorm; the argument is left as it is.

    Scale, shift and epsilon are copied, running statistics are dropped (they are functions of the data).
    The number of groups is the largest divisor of the channels up to ``groups``. A BatchNorm with its own
    activation (timm) becomes the GroupNorm followed by that activation. Raises ``ValueError`` for a lazy
    module not yet initialised.
    """
    if groups < 1:
        raise ValueError(f"groups={groups}: write 1 or more")
    if isinstance(model, _BatchNorm):
        return _replacement(model, groups, "model")
    result = copy.deepcopy(model)
    # A module used in two places stays one module.
    made: dict[int, nn.Module] = {}
    for path, module in list(result.named_modules()):
        for name, child in list(module._modules.items()):
            if isinstance(child, _BatchNorm):
                where = f"{path}.{name}" if path else name
                new = made.setdefault(id(child), _replacement(child, groups, where))
                setattr(module, name, new)
    return result


def _replacement(norm: _BatchNorm, groups: int, where: str) -> nn.Module:
    if isinstance(norm, nn.modules.lazy.LazyModuleMixin):
        raise ValueError(f"{where}: {type(norm).__name__} has no size yet; run the model once, then convert it")
    channels = norm.num_features
    count = max(g for g in range(1, min(groups, channels) + 1) if channels % g == 0)
    new = nn.GroupNorm(count, channels, eps=norm.eps, affine=norm.affine)
    if norm.affine:
        with torch.no_grad():
            for old, fresh in ((norm.weight, new.weight), (norm.bias, new.bias)):
                fresh.data = old.detach().clone()
                fresh.requires_grad_(old.requires_grad)
    new.train(norm.training)
    after = list(norm.children())
    return nn.Sequential(new, *after) if after else new
