"""The problems with known flat directions against closed forms and the rates of the theorems."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from jaxlab.config import load_config
from jaxlab.errors import CheckpointError
from jaxlab.evaluation.sharpness import evaluate_sharpness
from jaxlab.training.loop import load_run
from jaxlab.workloads.flat_toys import KAPPAS, SMALL_STEP_KAPPAS, small_step_end, train_flat_toys

CONFIG = Path(__file__).parents[2] / "configs" / "flat_toys.yaml"


@pytest.fixture(scope="module")
def told():
    return []


@pytest.fixture(scope="module")
def folder(tmp_path_factory, told):
    out = tmp_path_factory.mktemp("toys")
    train_flat_toys(load_config(CONFIG), out, report=told.append)
    return out


@pytest.fixture(scope="module")
def result(folder):
    return json.loads((folder / "flat_toys.json").read_text())


def rows(result, rule, problem="one", eta=None) -> list[dict]:
    found = [r for r in result["falls"] if (r["rule"], r["problem"]) == (rule, problem)]
    return [r for r in found if eta is None or r["eta"] == eta]


def by_hand(kappa: float, eta: float = 1.0) -> list:
    """The rule for u and v, in plain Python."""
    u, v, path = 1.0, 0.01, []
    for _ in range(5000):
        u, v = u - (1 + kappa) * eta * u * v * v, v - eta * (1 + u * u) * v
        path.append((u, v))
    return path


@pytest.mark.parametrize(
    "kappa, u, trace",
    [
        (0.0, 0.992887, 1.985825),
        (90.0, 0.928491, 1.862095),
        (900.0, 0.742592, 1.551442),
        (9000.0, 0.009979, 1.000100),
    ],
)
def test_descent_follows_the_rule_and_ends_where_it_must(result, kappa, u, trace):
    row = result["descent"][KAPPAS.index(kappa)]
    path = by_hand(kappa)
    np.testing.assert_allclose(row["first"], path[:2], rtol=1e-12)
    assert row["u"] == pytest.approx(path[-1][0], rel=1e-12)
    assert (round(row["u"], 6), round(row["trace"], 6)) == (u, trace)


def test_a_learning_rate_beyond_the_stability_of_v_diverges(result):
    assert result["learning_rate_2_is_finite"] is False


def test_small_steps_conserve_what_the_flow_conserves(result):
    ends = [0.937543, 0.875356, 0.693750, 0.430552, 0.134123]
    for row, kappa, end in zip(result["small_steps"], SMALL_STEP_KAPPAS, ends, strict=True):
        u = small_step_end(kappa, 1.0, 0.5)
        assert math.log(u) + u**2 / 2 == pytest.approx(0.5 - (1 + kappa) / 8, abs=1e-12)
        assert round(u, 6) == end
        # With a learning rate of 1e-3.
        assert row["u"] == pytest.approx(u, abs=4.2e-4)


FALLS = {
    ("average_sam", 0.05): (0.5941, 0.5940, 0.5943, 0.5958),
    ("average_sam", 0.1): (0.5808, 0.5808, 0.5820, 0.5831),
    ("sam", 0.01): (0.6016, 0.6016, 0.6016, 0.6016),
    ("sam", 0.05): (0.5813, 0.5815, 0.5822, 0.5832),
}


@pytest.mark.parametrize("rule, eta", FALLS)
def test_sharpness_falls_one_plus_kappa_times_as_fast_under_sam(result, rule, eta):
    """exp(-1/2) but for order eta, for every kappa up to 1/rho: theorems 5.5 and 5.6."""
    found = rows(result, rule, eta=eta)
    # SAM draws nothing; the table's average SAM has noise of its own, as ours has.
    tolerance = 1.2e-4 if rule == "sam" else 0.003
    assert [r["u"] for r in found] == pytest.approx(FALLS[rule, eta], abs=tolerance)
    assert found[-1]["kappa"] == pytest.approx(1 / found[-1]["rho"])
    for row in found:
        noise = 4 * row["u_std"] / math.sqrt(row["seeds"])
        assert row["u"] == pytest.approx(found[0]["u"], abs=0.0035 * found[0]["u"] + noise)
        assert row["steps"] * (1 + row["kappa"]) == pytest.approx(found[0]["steps"], rel=0.01)


@pytest.mark.parametrize("rule, eta", FALLS)
def test_the_sharp_direction_does_not_notice_kappa(result, rule, eta):
    for row in rows(result, rule, eta=eta):
        if rule == "average_sam":
            assert 0.58 < row["v_rms"] / (math.sqrt(eta) * row["rho"]) < 0.67
        else:
            assert 0.80 < row["v_max"] / (eta * row["rho"]) < 0.84


def test_with_two_samples_the_mean_of_their_sharpness_sets_the_rate(result):
    for row in rows(result, "sam", "two"):
        assert row["u"] == pytest.approx(0.591, abs=0.004)


def test_noise_in_the_sharp_direction_drives_the_flat_one(result):
    """Variance of v is eta sigma²/2, half of what the paper's appendix B prints."""
    for row in rows(result, "sgd", "noise"):
        noise = 4 * row["u_std"] / math.sqrt(row["seeds"])
        assert row["u"] == pytest.approx(0.605, abs=0.004 + noise)
        assert row["v_rms"] ** 2 / (row["eta"] * 0.3**2) == pytest.approx(0.5, abs=0.03)


def test_plots_are_written_and_every_file_is_named(folder, told):
    for name in ("paths", "falls"):
        assert (folder / f"flat_toys_{name}.png").read_bytes().startswith(b"\x89PNG")
    word, *named = told[-1].split()
    assert word == "wrote" and sorted(map(Path, named)) == sorted(folder.glob("flat_toys*"))
    assert any(line.startswith("predicted: u = exp(-0.5) = 0.6065") for line in told)
    assert {"one sample", "two samples", "noisy gradient"} <= {line[13:27].strip() for line in told}


def test_its_sharpness_is_refused_because_there_is_no_model(folder):
    with pytest.raises(CheckpointError, match="is a run of flat-toys, which trains no model"):
        evaluate_sharpness(folder)
    with pytest.raises(CheckpointError, match="is a run of flat-toys, not of a language model"):
        load_run(folder)
