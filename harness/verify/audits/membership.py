"""Membership inference by LiRA, offline (Carlini et al. 2022, arXiv:2112.03570): who was in the training data?

A pool of examples is public but for its coins: each is in the training data with probability 1/2, in every model by
coins of its own. What an attacker without the model in question knows is the others: the shadow models. An example
is guessed to be in where the model is surer of its label than models are that have not seen it.

Nothing is crafted here: the data, the model and the output (the last weights) are those that a user has. So it finds
much less than canaries in gradients do, and says more of what an outsider can find.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import rankdata
from torch import Tensor

from harness.dp.method import Method
from harness.dp.random import Stream
from harness.running.seeds import derive
from harness.running.train import Schedule, evaluating
from harness.verify.audits.bounds import CHOOSING, Sample, upper
from harness.verify.audits.canary import AuditTask, Refused
from harness.verify.audits.verdict import ONE_RUN, AuditSetting, Claim, Verdict, by_guesses, secrets, seeds, trained

FALSE_POSITIVES = (0.001, 0.01)  # the rates that true positives are counted at
ROUNDING = 1e-9  # confidences that differ by less are the same

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class MembershipSetting(AuditSetting):
    """How to attack: a pool of examples, and `repeat` models, each attacked by the others."""

    instrument: ClassVar[str] = "membership"

    task: str = "digits/mlp?hidden=64"
    examples: int = 1000
    rate: float = 0.1
    steps: int = 200
    repeat: int = 17

    def targets(self, task: AuditTask) -> int:
        return len(task.x)

    def trained(self) -> AuditTask:
        """The task, with the weights that all models start from."""
        return AuditTask.named(self.task, derive("membership init", self.task, self.seed), self.examples)


@dataclass(frozen=True)
class Pool:
    """Examples that are in the training data where their coin says so. n, which is public, counts all of them."""

    x: Tensor
    y: Tensor
    coins: Tensor

    n_test = 0

    @property
    def n_train(self) -> int:
        """Public: in or out, each has a slot."""
        return len(self.x)

    def batch(self, indices: Tensor, split: str = "train") -> tuple[Tensor, Tensor]:
        """Inputs and labels. The slot of one that is out holds nothing, and the batch is shorter by it."""
        there = indices[self.coins[indices]]
        return self.x[there], self.y[there]


@dataclass(frozen=True)
class Scored:
    """Scores and coins [models, examples], and the accuracy [models] on what each was trained on and was not."""

    scores: Floats
    inside: NDArray[np.bool_]
    seen: Floats
    unseen: Floats

    def bound(self, delta: float, level: float, seed: int) -> dict[str, Any]:
        """A lower bound on epsilon from the coins of the first model, the others being its shadows.

        Theorem 5.2 of Steinke et al. (arXiv:2305.08846) holds for any guess that depends on the output and on what is
        independent of the coins, as the other models are.
        """
        sample = Sample({"LiRA": self.scores[0]}, self.inside[0])
        return by_guesses(*sample.split(CHOOSING, seed), delta, level)

    def facts(self, level: float) -> dict[str, Any]:
        """AUC and true positives at few false positives, over all models. Information: no bound on epsilon.

        The intervals are Clopper and Pearson's, each with confidence 1 - `level`, as if scores were independent;
        examples share the models that they are scored with, and the threshold is that of the same scores.
        """
        outs, ins = self.scores[~self.inside], self.scores[self.inside]
        rates = {}
        for rate in FALSE_POSITIVES:
            threshold = np.sort(outs)[::-1][int(rate * len(outs))]
            positive, n = int((ins > threshold).sum()), len(ins)
            rates[f"{rate:g}"] = {
                "rate": positive / n, "low": 1 - float(upper(n - positive, n, level / 2)),
                "high": float(upper(positive, n, level / 2)), "false_positives": int((outs > threshold).sum()),
            }  # fmt: skip
        return {
            "auc": auc(ins, outs), "true_positive_rates": rates, "members": len(ins), "others": len(outs),
            "models": len(self.scores), "accuracy_members": float(self.seen.mean()),
            "accuracy_others": float(self.unseen.mean()),
        }  # fmt: skip


def audit(method: Method, s: MembershipSetting, task: AuditTask) -> Verdict:
    """The findings of an attack. A method without noise claims nothing, and is attacked all the same."""
    claim = Claim.of(method, s, len(task.x)) if method.noise.private else None
    scored = attack(method, s, task, claim.sigma if claim else 0.0)
    bounds, facts = {ONE_RUN: scored.bound(s.delta, s.level, s.seed)}, scored.facts(s.level)
    if claim is None:
        return Verdict(bounds, facts)
    return Verdict(bounds, facts, claim.price(claim.sigma), claim.accountant, claim.sigma)


def attack(method: Method, s: MembershipSetting, task: AuditTask, sigma: float) -> Scored:
    """Train `s.repeat` models on random halves of the pool and attack each with the others.

    Raises Refused where the method cannot be trained so, or its outputs are not one score for each class.
    """
    if method.loss.coupled:
        raise Refused("the loss of an example depends on the others of its batch: a slot cannot be left empty")
    if s.repeat < 3:
        raise Refused(f"{s.repeat} models are too few: an example needs shadow models that it is not in")
    n = len(task.x)
    schedule = Schedule(s.steps, max(1, round(s.rate * n)), s.steps)
    coins, confidences, right = [], [], []
    for seed in seeds("membership", method, s):
        coins.append(Stream(seed, "coins", 0).uniform(n) < 0.5)
        outputs = outputs_of(method, task, Pool(task.x, task.y, coins[-1]), sigma, schedule, seed)
        if outputs.ndim != 2 or outputs.shape[1] < 2:
            raise Refused(f"outputs {list(outputs.shape)} are not one score for each class")
        confidences.append(confidence(outputs, task.y))
        right.append(outputs.argmax(1) == task.y)
    inside, correct = torch.stack(coins).numpy(), torch.stack(right).numpy()
    return Scored(
        lira(torch.stack(confidences).numpy(), inside), inside,
        np.array([c[i].mean() for c, i in zip(correct, inside, strict=True)]),
        np.array([c[~i].mean() for c, i in zip(correct, inside, strict=True)]),
    )  # fmt: skip


def outputs_of(method: Method, task: AuditTask, pool: Pool, sigma: float, schedule: Schedule, seed: int) -> Tensor:
    """The outputs [n, K] of one model on all of the pool, after training on those that are in."""
    model = copy.deepcopy(task.body)
    if reason := method.engine.accepts(method.loss, method.clip, model):
        raise Refused(reason)
    progress = trained(method, model, pool, sigma, schedule, secrets(seed, "membership"), where="here")
    with evaluating(model, method.path.kept(progress.w, progress.parts.path)):
        return torch.cat([model(part) for part in task.x.split(1024)])


def confidence(outputs: Tensor, y: Tensor) -> Tensor:
    """The logit of the probability of the right class, log p - log(1 - p) [n], from outputs [n, K] (section V-A)."""
    own = outputs.double().gather(1, y[:, None])
    others = outputs.double().scatter(1, y[:, None], -torch.inf).logsumexp(1)
    return own.squeeze(1) - others


def lira(confidences: Floats, inside: NDArray[np.bool_]) -> Floats:
    """Scores [models, examples]: how far a model's confidence lies above that of models without the example.

    Offline attack (section VI-B): a normal fits the confidences of the other models that an example is not in. Its
    deviation is one for all examples, which is better for few models (section VI-C). 0 where there is no such model.
    """
    scores = np.zeros_like(confidences)
    for target in range(len(confidences)):
        out = ~inside
        out[target] = False
        count = out.sum(0)
        mean = np.where(out, confidences, 0.0).sum(0) / np.maximum(count, 1)
        away = (confidences - mean)[out]
        free = max(1, int(out.sum() - (count > 0).sum()))  # a mean was fitted to each example
        deviation = np.sqrt((away**2).sum() / free)
        known = (count > 0) & (deviation > ROUNDING * (1 + np.abs(mean)))
        scores[target, known] = (confidences[target] - mean)[known] / deviation
    return scores


def auc(ins: Floats, outs: Floats) -> float:
    """The probability that one of `ins` exceeds one of `outs`, ties counted half."""
    ranks = rankdata(np.concatenate([ins, outs]))[: len(ins)]
    return float((ranks.sum() - len(ins) * (len(ins) + 1) / 2) / (len(ins) * len(outs)))
