"""What a record says of each stage of a run of two, as the pages need it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from harness.report.model.fields import Fields, pairs, part_text


@dataclass(frozen=True)
class StageFacts:
    """One stage, read as a `Run` is: None and empty texts are unknown, an infinite sensitivity or epsilon is infinite.

    `epsilon` is what had been spent on the private data when the stage ended, `rdp` the same by RDP.
    """

    method: str
    parameters: str
    parts: str
    trains: str
    data: str
    public: bool
    batch: int | None
    steps: int | None
    epochs: float | None
    sampling: str
    relation: str
    sensitivity: Mapping[str, float]
    note: str
    rate: float | None
    seconds: float | None
    engine: str
    epsilon: float | None
    rdp: float | None

    @classmethod
    def of(cls, f: Fields) -> StageFacts:
        """The stage that the fields of `harness.records.stages.stage_facts` describe."""
        spent = f.epsilons("spent")
        epsilon = spent.get(f.text("accountant"), f.number("epsilon"))
        rdp = spent.get("rdp")
        return cls(
            method=f.text("method", "(unnamed)"),
            parameters=", ".join(f"{k} = {v}" for k, v in pairs(f.mapping("parameters"))),
            parts=", ".join(f"{k} {part_text(v)}" for k, v in sorted(f.mapping("parts").items(), key=str)),
            trains=f.text("trains"),
            data=f.text("data"),
            public=f.any("public") is True,
            batch=f.whole("batch"),
            steps=f.whole("steps"),
            epochs=f.number("epochs"),
            sampling=f.text("sampling"),
            relation=f.text("relation"),
            sensitivity=f.epsilons("sensitivity"),
            note=f.text("sensitivity_note"),
            rate=f.number("examples_per_second.median"),
            seconds=f.number("train_seconds"),
            engine=f.text("engine"),
            epsilon=epsilon,
            rdp=None if rdp is None or (math.isinf(rdp) and epsilon is not None and math.isfinite(epsilon)) else rdp,
        )


def sampling(stages: tuple[StageFacts, ...], of_run: str) -> str:
    """How batches of private data are sampled: in all stages, or of each where they differ or are not all known."""
    names = [one.sampling or "not recorded" for one in stages if not one.public]
    if len(set(names)) < 2:
        return names[0] if stages and names[0] == stages[0].sampling else of_run
    return "; ".join(f"{name} (stage {number})" for number, name in enumerate(names, 1))
