"""Optimizers for a linear head that use released second moments of its features: post-processing, all of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from harness.dp.clip.rule import positive
from harness.dp.optimizer.optimizer import Deviations, Optimizer
from harness.dp.optimizer.symmetric import projected, spectrum, unpacked
from harness.dp.tree import Layout, Tree


def rows(head: Tree) -> Tensor:
    """Weight [K, D] and bias [K] of a linear head as one matrix [K, D + 1]; without a bias, [K, D]."""
    return torch.cat([head[name].reshape(count, width) for name, count, width in _blocks(head.layout)], 1)


def head_of(matrix: Tensor, like: Tree) -> Tree:
    """The head with these rows: the inverse of `rows`, in the layout and dtype of `like`."""
    pieces = matrix.to(like.flat.dtype).split([width for _, _, width in _blocks(like.layout)], 1)
    return like.with_flat(torch.cat([piece.reshape(-1) for piece in pieces]))


def _blocks(layout: Layout) -> list[tuple[str, int, int]]:
    """Each tensor's name, the number of classes and how many columns it has. Raises ValueError where it is no head."""
    shapes = [tuple(shape) for shape in layout.shapes]
    if [len(shape) for shape in shapes] not in ([2], [2, 1]) or len({shape[0] for shape in shapes}) > 1:
        raise ValueError(f"a linear head has a weight [K, D] and perhaps a bias [K], not {shapes}")
    return [(n, s[0], s[1] if len(s) == 2 else 1) for n, s in zip(layout.names, shapes, strict=True)]


@dataclass(frozen=True)
class Preconditioned(Optimizer):
    """DP-FC (Mehta et al., arXiv:2211.13403): W -= lr * g (A + reg I)^-1, row by row.

    A is the positive semi-definite matrix nearest to the Gram matrix that the engine `WithGram` releases at the first
    step. It is decomposed once, which makes every later step an exact solve, where the paper takes conjugate gradients.

    A and g arrive divided by the public denominator, so A's trace is at most the squared bound on a feature vector,
    and `reg` is the paper's divided by that denominator.
    """

    lr: float = 1.0
    reg: float = 0.01

    def __post_init__(self) -> None:
        if self.lr < 0:
            raise ValueError(f"lr must not be negative, and is {self.lr}")
        positive(reg=self.reg)

    def receive(
        self, state: dict[str, Tensor] | None, public: Mapping[str, Tree], deviations: Deviations
    ) -> dict[str, Tensor] | None:
        if "gram" not in public:
            return state
        gram = public["gram"].flat
        values, vectors = spectrum(unpacked(gram))
        # contiguous, as a checkpoint gives them back: products of another layout end in other bits
        return {"values": values.to(gram.dtype), "vectors": vectors.to(gram.dtype).contiguous()}

    def update(self, g: Tree, state: dict[str, Tensor] | None, w: Tree) -> tuple[Tree, dict[str, Tensor]]:
        if state is None:
            raise ValueError("Preconditioned needs a Gram matrix: use the engine WithGram")
        values, vectors = state["values"], state["vectors"]
        direction = (rows(g).to(vectors.dtype) @ vectors / (values + self.reg)) @ vectors.T
        return w - head_of(direction * self.lr, w), state


@dataclass(frozen=True)
class LeastSquares(Optimizer):
    """DP-LS (Mehta et al., arXiv:2211.13403): theta_l = (L_l + alpha G + reg I)^-1 r_l for each class l.

    From the engine `Moments`: r_l is -"grad", the sum of the features of class l, L_l the sum of their f f^T, and G
    that of all classes, L_l and G made positive semi-definite first. This is the minimum of the mean loss
    `Squares(alpha)` plus reg/2 |W|^2, wherever W was before.

    Moments arrive divided by the public denominator: `reg` is the paper's divided by it. Those of several steps are
    averaged, and weigh as one step's with the noise of all together.
    """

    alpha: float = 1.0
    reg: float = 1e-2

    def __post_init__(self) -> None:
        if self.alpha < 0:
            raise ValueError(f"alpha must not be negative, and is {self.alpha}")
        positive(reg=self.reg)

    def init(self, w: Tree, steps: int) -> dict[str, Any]:
        return {"t": 0, "moments": {}}

    def receive(self, state: dict[str, Any], public: Mapping[str, Tree], deviations: Deviations) -> dict[str, Any]:
        return {**state, "moments": state["moments"] | self._averaged(state, public)}

    def update(self, g: Tree, state: dict[str, Any], w: Tree) -> tuple[Tree, dict[str, Any]]:
        moments = state["moments"] | self._averaged(state, {"grad": g})
        if "class_gram" not in moments:
            raise ValueError("LeastSquares needs moments of the features: use the engine Moments")
        first = rows(moments["grad"]).neg().double()
        gram = projected(unpacked(moments["gram"].flat))
        shared = self.alpha * gram + self.reg * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
        solved = [
            torch.cholesky_solve(r[:, None], torch.linalg.cholesky(shared + projected(unpacked(own))))[:, 0]
            for r, own in zip(first, moments["class_gram"]["class_gram"], strict=True)
        ]
        return head_of(torch.stack(solved), w), {"t": state["t"] + 1, "moments": moments}

    @staticmethod
    def _averaged(state: dict[str, Any], new: Mapping[str, Tree]) -> dict[str, Tree]:
        """The running means of releases, `new` being those of step t = 0, 1, ..."""
        old, t = state["moments"], state["t"]
        return {name: old[name] + (tree - old[name]) / (t + 1) if t else tree for name, tree in new.items()}
