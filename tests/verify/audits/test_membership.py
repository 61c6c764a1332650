"""Membership inference finds members where there is something to find, and nothing where there is nothing."""

import numpy as np
import pytest
import torch
from scipy.stats import norm

from harness import cli, registry
from harness.records import audits
from harness.verify.audits.canary import Refused
from harness.verify.audits.membership import MembershipSetting, Scored, attack, auc, confidence, lira

SMALL = MembershipSetting(examples=300, steps=60, repeat=9, rate=0.5)


def facts(spec: str, sigma: float, setting: MembershipSetting = SMALL) -> dict:
    entry, options = registry.lookup("method", spec)
    return attack(registry.load(entry)(**options), setting, setting.trained(), sigma).facts(setting.level)


def test_members_of_an_overfitted_model_stand_out_and_of_an_untrained_one_do_not():
    found = facts("non-private?lr=0.2", 0.0)
    assert found["accuracy_members"] > found["accuracy_others"] + 0.03 and found["auc"] > 0.6
    at = found["true_positive_rates"]["0.01"]
    assert at["low"] > 0.02 and at["low"] < at["rate"] < at["high"]  # more than the 1 % of chance
    assert at["false_positives"] <= 0.01 * found["others"]
    # 2,700 guesses: 0.5 +- 0.011 (one standard error)
    assert abs(facts("dp-sgd?lr=0.1", 1e3)["auc"] - 0.5) < 0.05
    assert facts("dp-sgd?lr=0", 1.0)["auc"] == 0.5  # all models are the same: all are ties


def test_scores_are_the_distance_from_models_without_the_example():
    rng = np.random.default_rng(0)
    inside, hard = rng.random((64, 1000)) < 0.5, rng.normal(size=1000) * 20
    scores = lira(hard + rng.normal(size=inside.shape) * 3 + 3 * inside, inside)  # one deviation apart
    outs, ins = scores[~inside], scores[inside]
    assert abs(outs.mean()) < 0.02 and ins.mean() == pytest.approx(1, abs=0.03)
    # How hard an example is cancels; what is left of 32 shadow models is the error of their mean.
    assert auc(ins, outs) == pytest.approx(norm.cdf(1 / np.sqrt(2 * (1 + 1 / 32))), abs=0.01)


def test_a_model_is_no_shadow_of_its_own():
    rng = np.random.default_rng(3)
    inside, confidences = rng.random((9, 50)) < 0.5, rng.normal(size=(9, 50))
    surer = confidences.copy()
    surer[0] += 1  # nothing that it is compared with moves: in or out, every score rises alike
    rise = lira(surer, inside)[0] - lira(confidences, inside)[0]
    assert rise == pytest.approx(np.full(50, rise[0])) and rise[0] > 0.5
    alone = np.zeros((3, 1), bool)
    alone[1:] = True  # nobody but the first is without the example
    assert lira(np.array([[5.0], [1.0], [2.0]]), alone)[0, 0] == 0


def test_confidence_is_the_logit_of_the_right_class_without_overflow():
    outputs, y = torch.tensor([[1.0, 2.0, 4.0], [0.0, 800.0, 0.0]]), torch.tensor([2, 1])
    p = outputs[0].double().softmax(0)[2]
    assert float(confidence(outputs, y)[0]) == pytest.approx(float(torch.log(p / (1 - p))))
    assert float(confidence(outputs, y)[1]) == pytest.approx(800 - np.log(2))


def test_the_bound_is_that_of_one_model_alone():
    inside = np.random.default_rng(1).random((5, 400)) < 0.5
    blind = np.random.default_rng(2).normal(size=(5, 400))
    seeing = blind.copy()
    seeing[1:] = inside[1:]  # other models say nothing of the first one's coins
    accuracy = np.zeros(5)
    assert Scored(seeing, inside, accuracy, accuracy).bound(1e-5, 0.01, 0)["epsilon"] < 0.3
    seeing[0] = inside[0]
    assert Scored(seeing, inside, accuracy, accuracy).bound(1e-5, 0.01, 0)["epsilon"] > 2


def test_the_command_records_what_was_found(tmp_path, capsys):
    request = ["dp-sgd", "non-private", "--membership", "--examples", "200", "--steps", "5", "--repeat", "3"]
    assert cli.main(["audit", *request, "--results", str(tmp_path)]) == 0
    kept = {a["method"]: a for a in audits.load(tmp_path / "audits")}
    assert kept["dp-sgd"]["instrument"] == MembershipSetting.instrument and kept["dp-sgd"]["trials"] == 3
    assert kept["dp-sgd"]["epsilon_audited"] <= kept["dp-sgd"]["epsilon_claimed"] <= 3
    assert kept["non-private"]["epsilon_claimed"] is None and not kept["non-private"]["flagged"]
    assert {"auc", "true_positive_rates"} <= kept["dp-sgd"]["facts"].keys()
    assert "not refuted" in capsys.readouterr().out


def test_models_without_shadows_are_refused():
    with pytest.raises(Refused, match="too few"):
        facts("dp-sgd", 1.0, MembershipSetting(repeat=2, steps=1))
