"""Laws of the studies' own arithmetic, without running them."""

from benchmarks import ire_cost, llama_ire


def cell(rate: str, seed: int, loss: float) -> dict:
    return {
        "set": {"optimizer.learning_rate": rate, "seed": str(seed)},
        "status": "done",
        "seed": seed,
        "validation_loss": loss,
    }


def test_each_number_of_rows_is_measured_once_at_the_largest_share_that_gives_it():
    assert ire_cost.distinct_rows([1.0, 0.5, 0.25, 0.125], 4) == {4: 1.0, 2: 0.5, 1: 0.25}
    assert ire_cost.distinct_rows([1.0, 0.5, 0.25, 0.125], 8) == {8: 1.0, 4: 0.5, 2: 0.25, 1: 0.125}


def test_the_best_settings_are_those_of_the_seed_that_was_swept_whatever_its_number():
    swept = [cell("1", 7, 5.0), cell("2", 7, 4.0), cell("3", 7, 6.0)]
    other = [cell("1", 0, 1.0), cell("2", 0, 9.0)]
    found = llama_ire.at_best(other + swept, 7)
    assert [(c["seed"], c["validation_loss"]) for c in found] == [(0, 9.0), (7, 4.0)]
