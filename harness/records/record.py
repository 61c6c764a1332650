"""What a record holds: the one definition, of which all else follows.

That is: what is read and what is quarantined, and the JSON Schema in docs/ (`harness.records.schema`), what writers
begin with (`blank`), what of a run may be published (`harness.records.public`), the columns of the pandas table
(`harness.records.frame`), and what ``epsbench show`` prints.

A record is a plain dict in the program. A key may be added without a new version: older records lack it (`UNSET`), and
what a later program adds is passed over. An infinite epsilon is null. docs/record-schema.md explains each key.
"""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Literal

import msgspec
from msgspec import UNSET, Meta

from harness.records.field import (
    CATEGORY,
    Amount,
    Bounds,
    Came,
    Closed,
    Column,
    Count,
    Digest,
    Id,
    Maybe,
    Old,
    Open,
    Positive,
    Private,
    Probability,
    Relation,
    Share,
    Short,
    Suite,
    Tally,
    Text,
    says,
)

SCHEMA = 2
"""Version of the records that are written. Those of version 1 have some of what is private elsewhere."""
READ = (1, SCHEMA)
FINAL = ("ok", "diverged", "skipped", "over_budget")
"""Statuses that running again would only repeat."""
FAILED = ("crashed", "oom", "timeout")
"""Statuses that may end otherwise next time; `run --retry` makes another attempt."""
STATUSES = FINAL + FAILED


class Part(Open):
    """A part of a method: its class and its fields; fields that change only speed are left out."""

    type: str


class Quartiles(Closed):
    median: float | None
    q1: float | None
    q3: float | None


Parts = dict[str, Part]


class Method(Closed):
    name: Annotated[str, Column("method", CATEGORY)]
    label: Annotated[str, says("Name in tables."), Column("label", CATEGORY)]
    parameters: Annotated[dict[str, Any], says("Hyper-parameters, defaults expanded."), Column()]
    parts: Parts
    with_: Annotated[
        Maybe[dict[str, str]],
        says("Parts that the suite gives the method, slot to spec; absent where there are none."),
        Column("with_parts"),
    ] = msgspec.field(default=UNSET, name="with")


class Task(Open):
    name: Annotated[str, says("Name in tables."), Column("task", CATEGORY)]
    dataset: Annotated[str, says("Spec of the data set."), Column("dataset", CATEGORY)]
    model: Annotated[str, says("Spec of the model."), Column("model", CATEGORY)]
    evaluate: Annotated[Literal["test", "validation"], Column("split", CATEGORY)]
    digest: Annotated[str, says("Of the content in canonical order.")]
    n_train: Annotated[Count, says("Examples trained on."), Column()]
    mean: Maybe[list[float]] = UNSET
    std: Maybe[list[float]] = UNSET
    architecture: Annotated[Maybe[dict[str, Any]], says("The model's name and all its options.")] = UNSET


class Tuning(Closed):
    """A search for hyper-parameters on private data."""

    tries: Annotated[
        float, says("Trials that they were chosen by: the number where it is fixed, else its mean."), Meta(ge=1)
    ]
    distribution: Annotated[Literal["fixed", "poisson", "geometric", "logarithmic"], says("Of the number of trials.")]
    retrained: Annotated[bool, says("Whether this run is one more; else it is the best trial itself.")]


class Target(Closed):
    epsilon: Annotated[Positive | None, says("The target; null without one."), Column("target_epsilon")]
    delta: Annotated[Probability | None, Column("delta")]
    relation: Annotated[Relation, Column("relation", CATEGORY)]
    unit: Literal["example"]
    accountant: Annotated[Maybe[str | None], says("The accountant that the noise was calibrated by.")] = UNSET
    tuning: Maybe[Tuning] = UNSET


class Schedule(Open):
    batch: Annotated[Count, says("Expected logical batch."), Column()]
    steps: Annotated[Count, says("Logical steps."), Column()]


class Numerics(Closed):
    dtype: Annotated[Literal["float32", "float64"], Column("dtype", CATEGORY)]
    tf32: bool


class PublicTask(Open):
    dataset: str
    digest: str


class Then(Closed):
    """A second stage, which goes on with the trained network under a new head; absent where there is none."""

    name: Annotated[str, says("Its method.")]
    parameters: Annotated[dict[str, Any], says("Hyper-parameters, defaults expanded.")]
    parts: Parts
    trains: Literal["head", "all"]
    schedule: Schedule
    task: Annotated[
        Maybe[PublicTask], says("The public data that it trains on; absent where it trains on the private data.")
    ] = UNSET


class Cell(Closed):
    """What was to be run. The id is made of it, without label, name, dataset and model."""

    method: Method
    task: Task
    privacy: Target
    schedule: Schedule
    numerics: Numerics
    seed: Annotated[Tally, Column()]
    then: Maybe[Then] = UNSET


class Card(Closed):
    """What the registry says about the method."""

    family: Annotated[str | None, says("Kind of method."), Column("family", CATEGORY)]
    paper: Annotated[str | None, says("arXiv identifier or the like.")]
    summary: Annotated[str | None, says("First line of the method's docstring.")]


class Metrics(Open):
    """Evaluated once, at the last step, on cell.task.evaluate; empty where there was no last step."""

    accuracy: Annotated[Maybe[Share | None], says("Fraction of examples classified correctly."), Column()] = UNSET
    loss: Annotated[Maybe[float | None], says("Mean loss."), Column()] = UNSET
    examples: Annotated[
        Maybe[Count], says("How many examples they are of: an accuracy is a count over them. Absent in older records.")
    ] = UNSET


class Assumption(Closed):
    text: Annotated[str, says("The assumption.")]
    holds: Annotated[bool | None, says("Whether it was found to hold; null where a run cannot decide it.")]
    why: Annotated[str, says("What was seen.")]


class Claim(Closed):
    """An epsilon that holds under the method's own assumptions; it never ranks."""

    epsilon: Annotated[
        Amount | None,
        says("Null is no claim: an assumption failed, or no finite epsilon came out."),
        Column("epsilon_claimed"),
    ]
    source: Annotated[str, says("Where the analysis is from.")]
    assumptions: Annotated[list[Assumption], Meta(min_length=1), says("All that the epsilon assumes.")]
    failed: Annotated[
        list[str], says("The assumptions that do not hold, each with what was seen; empty where the claim stands.")
    ]

    def __post_init__(self) -> None:
        if self.failed and self.epsilon is not None:
            raise ValueError("an assumption failed, and there is an epsilon all the same")


class WithTuning(Tuning):
    """Of the run and of the search for its hyper-parameters on private data; it never ranks."""

    epsilon: Annotated[Amount | None, says("Null is infinite.")]
    accountant: Annotated[str, says("Whose epsilon it is: the first that knows the event.")]


class Event(Open):
    type: Annotated[str, says("Class of dp_accounting.")]


class Privacy(Closed):
    """What was spent, and on what terms."""

    relation: Annotated[Relation, says("Neighbouring relation of the analysis; null where it is not known.")]
    unit: Literal["example"] | None
    sampling: Annotated[
        str | None, says("The distribution of the batches of private data, in words; of each stage where they differ.")
    ]
    sensitivity: Annotated[
        Bounds | None,
        says(
            "l2 sensitivity of each release in the last step, null inside is infinite; null for a run of"
            " two stages, whose `stages` hold it."
        ),
    ]
    delta: Probability | None
    planned: Annotated[Bounds, says("Epsilon of the plan, by accountant; null is infinite.")]
    epsilon: Annotated[Amount | None, says("Spent, by that accountant; null is infinite."), Column()]
    spent: Annotated[Bounds, says("Epsilon of the ledger, by accountant; null is infinite.")]
    accountant: Annotated[str | None, says("The accountant whose epsilon ranks.")]
    claimed: Claim | None
    noise_multiplier: Annotated[
        Amount | None,
        says("Joint multiplier: standard deviation over sensitivity under `relation`; null without noise."),
        Column(),
    ]
    ledger: Annotated[list[tuple[Event, Count]], says("What was released: [event, how often in a row], in order.")]
    public_data: Annotated[str | None, says('Public data used; "none" where none was.')]
    sensitivity_note: Annotated[
        Maybe[str],
        says("One line on a sensitivity that the engine itself declares; absent where it is the clipping rule's."),
    ] = UNSET
    accounting: Annotated[
        Maybe[dict[str, Text]],
        says("By accountant: why it has no finite epsilon; of rdp, the order that binds, and those that overflowed."),
    ] = UNSET
    epsilon_with_tuning: Maybe[WithTuning] = UNSET
    privately_judged: Annotated[
        Maybe[list[Count]],
        says(
            "Stages, from 1, whose accuracy and loss count private examples or follow their labels. Absent"
            " in older records."
        ),
    ] = UNSET


class StageDiagnostics(Closed):
    """Private, not for publication, of this stage alone."""

    examples_per_second: Annotated[Maybe[Quartiles], says("Over its timed blocks of steps.")] = UNSET
    train_seconds: Annotated[Maybe[Amount], says("Seconds in its timed blocks.")] = UNSET
    microbatch: Annotated[Maybe[Count | None], says("On how many examples at once, in its last step.")] = UNSET
    train_loss: Annotated[
        Maybe[float | None], says("Mean of its own loss on the batches since the last log point but one.")
    ] = UNSET
    clipped_fraction: Annotated[Maybe[Share | None], says("Share of its contributions with a weight below 1.")] = UNSET
    non_finite: Annotated[Maybe[Tally], says("Contributions left out because their gradient was not finite.")] = UNSET


class Stage(Closed):
    """What came of a stage, from `sensitivity` on, is absent where it was not begun. Older records lack most."""

    method: str
    data: Annotated[str, says("The data set that it trains on.")]
    public: Annotated[bool, says("Whether those are public data, which releases nothing of the private ones.")]
    steps: Annotated[Count, says("Logical steps.")]
    trains: Annotated[Maybe[Literal["all", "head"]], says("The head alone, or the whole network.")] = UNSET
    batch: Annotated[Maybe[Count], says("Expected logical batch.")] = UNSET
    epochs: Annotated[Maybe[Positive], says("Expected passes over its data.")] = UNSET
    sampling: Annotated[Maybe[str], says("The distribution of its batches, in words.")] = UNSET
    relation: Annotated[
        Maybe[Relation], says("Neighbouring relation of its releases; null where the data are public.")
    ] = UNSET
    sensitivity: Annotated[
        Maybe[Bounds | None],
        says(
            "l2 sensitivity of each of its releases in its last step, null inside is infinite; null where"
            " the data are public."
        ),
        Came(),
    ] = UNSET
    sensitivity_note: Annotated[
        Maybe[str],
        says("One line on a sensitivity that its engine itself declares; absent where it is the clipping rule's."),
        Came(),
    ] = UNSET
    engine: Annotated[Maybe[str | None], says("What computed its clipped sums."), Came()] = UNSET
    spent: Annotated[
        Maybe[Bounds],
        says(
            "Epsilon of all that had been released of the private data when it ended, by accountant; null is infinite."
        ),
        Came(),
    ] = UNSET
    accountant: Annotated[Maybe[str | None], says("The accountant whose epsilon ranks."), Came()] = UNSET
    epsilon: Annotated[
        Maybe[Amount | None], says("Spent until then, by that accountant; null is infinite."), Came()
    ] = UNSET
    diagnostics: Annotated[Maybe[StageDiagnostics], Private()] = UNSET
    examples_per_second: Annotated[Maybe[Quartiles], Old()] = UNSET
    train_seconds: Annotated[Maybe[Amount], Old()] = UNSET
    microbatch: Annotated[Maybe[Count | None], Old()] = UNSET
    train_loss: Annotated[Maybe[float | None], Old()] = UNSET
    clipped_fraction: Annotated[Maybe[Share | None], Old()] = UNSET
    non_finite: Annotated[Maybe[Tally], Old()] = UNSET


class Diagnostics(Open):
    """Private, not for publication: functions of private examples, of the batches that were really drawn, or of time
    and memory. Empty in a record that is passed on without them."""

    examples_per_second: Annotated[
        Maybe[Quartiles | None],
        says("Over timed blocks of steps, without the warm-up; of the first stage where there are two."),
        Column(),
    ] = UNSET
    peak_memory_mib: Annotated[
        Maybe[Amount | None], says("GPU: torch's tensors; CPU: resident set of the process."), Column()
    ] = UNSET
    train_seconds: Annotated[Maybe[Amount | None], says("Seconds in timed blocks, of all stages."), Column()] = UNSET
    wall_seconds: Annotated[Maybe[Amount | None], says("Seconds of the session, all included."), Column()] = UNSET
    train_loss: Annotated[Maybe[float | None], says("Mean loss on the batches of the last log interval.")] = UNSET
    clipped_fraction: Annotated[
        Maybe[Share | None], says("Share of contributions with a weight below 1; null where nothing is clipped.")
    ] = UNSET
    non_finite: Annotated[
        Maybe[Tally | None], says("Contributions left out because their gradient was not finite.")
    ] = UNSET
    load_average: Annotated[
        Maybe[float | None], says("Mean number of busy processes on the machine over the last minute, at the end.")
    ] = UNSET
    microbatch: Annotated[
        Maybe[Count | None],
        says("On how many examples at once, in the last step (of the first stage): no more than were drawn."),
    ] = UNSET


class Measured(Open):
    """What was used, whatever the private data are. Schema 1 has what is private here too."""

    jobs: Annotated[Count | None, says("Runs that could go on at once on this machine."), Column()]
    engine: Annotated[
        Maybe[str | None], says("What computed the clipped sums; in the first stage where there are two.")
    ] = UNSET
    kernels: Annotated[Maybe[str], says("The compiler that made the native kernels, or none and why.")] = UNSET
    warmup_steps: Maybe[Tally | None] = UNSET
    sessions: Annotated[Maybe[Count | None], says("1, and 1 more for each interruption.")] = UNSET
    examples_per_second: Annotated[Maybe[Quartiles | None], Old()] = UNSET
    train_seconds: Annotated[Maybe[Amount | None], Old()] = UNSET
    wall_seconds: Annotated[Maybe[Amount | None], Old()] = UNSET
    peak_memory_mib: Annotated[Maybe[Amount | None], Old()] = UNSET
    load_average: Annotated[Maybe[float | None], Old()] = UNSET
    microbatch: Annotated[Maybe[Count | None], Old()] = UNSET


class Randomness(Closed):
    """What noise, batches and path were drawn by, besides the cell. Absent in older records, where it was the cell
    alone."""

    attempt: Annotated[Count, says("Number of the attempt whose random numbers these are.")]
    code: Annotated[Id, says("Hash of the code that it began with.")]
    setting: Annotated[
        Maybe[Id],
        says(
            "Hash of what else decides its sums to the bit: device, threads, engine, microbatch, libraries, kernels."
            " Absent in older records."
        ),
    ] = UNSET
    dropout_bits: Annotated[
        Maybe[Count],
        says(
            "How many bits have to be guessed to know the masks of dropout: a stream's key, or the 64 of a"
            " GPU's generator. Absent in older records."
        ),
    ] = UNSET


class Code(Closed):
    commit: Annotated[str | None, says("Commit of the checkout."), Column("commit", CATEGORY)]
    dirty: Annotated[bool | None, says("Whether tracked files had uncommitted changes."), Column()]
    hash: Annotated[
        Id | None,
        says("Over the code that decides the numbers; where today's differs the record is stale."),
        Column("code_hash", CATEGORY),
    ]
    files: Annotated[dict[str, str], says("Path to hash of each file that it covers.")]


class Device(Closed):
    name: Annotated[str | None, says("Model of the processor or GPU."), Column("device", CATEGORY)]
    kind: Annotated[Literal["cpu", "cuda"], Column("device_kind", CATEGORY)]
    fingerprint: Annotated[
        Short | None,
        says("Hash of name, kind and threads: throughput is compared only within one."),
        Column("device_fingerprint", CATEGORY),
    ]
    threads: Annotated[Count | None, Column()]
    spec: Annotated[str, says("As the suite names it.")]
    microbatch: Annotated[
        Maybe[Count | None], says("Examples to take at once, as in the suite; null or absent where the engine chooses.")
    ] = UNSET


class Record(Closed):
    """One run: results/<suite>/<id>/record.json. Strict JSON: no NaN, no infinities; an infinite epsilon is null.
    docs/record-schema.md explains each key."""

    schema: Annotated[Literal[1, 2], says("Version of this format.")]
    suite: Annotated[Suite, says("Name of the suite, and of the folder above."), Column("suite", CATEGORY)]
    id: Annotated[Id, says("The cell's identity; the folder is named after it."), Column()]
    group: Annotated[Id, says("The identity without the seed: runs that differ in the seed only share it."), Column()]
    status: Annotated[
        Literal["ok", "diverged", "skipped", "over_budget", "crashed", "oom", "timeout"],
        says("How the run ended."),
        Column("status", CATEGORY),
    ]
    reason: Annotated[Text | None, says("Why the status is not ok; null where it is."), Column()]
    cell: Cell
    card: Card
    metrics: Metrics
    privacy: Privacy
    diagnostics: Diagnostics
    measured: Measured
    weights_sha256: Annotated[Digest | None, says("SHA-256 of the evaluated weights, bit for bit.")]
    device: Device
    code: Code
    environment: Annotated[dict[str, Any], says("Versions, hardware, thread settings.")]
    started: Annotated[
        str | None,
        says(
            "When the session that wrote the record started, ISO 8601 in UTC; the day alone in a record"
            " that is passed on without what is private."
        ),
        Column("started", "datetime64[us, UTC]"),
    ]
    finished: Annotated[
        str | None,
        says(
            "When it ended. Private, not for publication: null in a record that is passed on without what is private."
        ),
        Column("finished", "datetime64[us, UTC]"),
    ]
    stages: Annotated[
        Maybe[Annotated[list[Stage], Meta(min_length=2)]],
        says("Of a run of two stages, each one: what it is, and what came of it; absent for others."),
    ] = UNSET
    randomness: Maybe[Randomness] = UNSET

    def __post_init__(self) -> None:
        """What no single field can say. Raises ValueError."""
        ok = self.status == "ok"
        for name in ("relation", "sampling"):
            if ok and getattr(self.privacy, name) is None:
                raise ValueError(f'"privacy.{name}" is null, so nobody can say what its epsilon means')
        if ok and (self.reason is not None or self.weights_sha256 is None or self.code.hash is None):
            raise ValueError("the status is ok, with a reason, or without the hash of the weights or of the code")
        if ok and not self.privacy.ledger:
            raise ValueError('"privacy.ledger" is empty, and the status is ok')
        if not ok and self.reason is None:
            raise ValueError(f'"reason" is null, and the status is {self.status}')
        if ok and not self.privacy.privately_judged and UNSET in (self.metrics.accuracy, self.metrics.loss):
            raise ValueError('"metrics" lacks accuracy or loss, and the status is ok')
        for name in ("started", "finished"):
            moment = getattr(self, name)
            try:
                datetime.fromisoformat("1970-01-02" if moment is None else moment).timestamp()
            except (ValueError, OverflowError, OSError):
                raise ValueError(f'"{name}" is not a moment in ISO 8601') from None
