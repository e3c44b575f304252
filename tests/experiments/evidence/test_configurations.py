"""The presets make every preregistered configuration, and nothing that is none."""

from experiments import grids
from experiments.evidence.configurations import CONFIGURATIONS, SIZES, named, per_row
from tests.experiments.evidence.synthetic import rows

PRESETS = ("critical", "critical-data", "critical-rank", "critical-crossed", "critical-model", "sgd")


def test_the_presets_make_every_configuration_and_no_other():
    runs = [c for name in PRESETS for c in grids.load(f"laptop-{name}").configs]
    found = named({"config": config.to_dict()} for config in runs)
    assert list(found) == list(CONFIGURATIONS)
    assert sum(map(len, found.values())) == len(runs)
    for name, part in found.items():
        configs = [row["config"] for row in part]
        assert {c["n_train"] * per_row(part) for c in configs} == {max(SIZES)}, name
        assert {c["seed"] for c in configs} >= {0, 1}
        assert {c["batch_size"] for c in configs if c["gns_every"]} == {4}


def test_no_run_of_another_sweep_is_of_a_configuration():
    """Those of `laptop-schedule` have a constant rate as well: on half of the data, evaluated four times."""
    wanted = {c.hash for name in PRESETS for c in grids.load(f"laptop-{name}").configs}
    more = {
        name for name in grids.names() if name.startswith("laptop-critical") or name == "laptop-sgd-seeds"
    }
    for name in set(grids.names()) - more:
        runs = [c for c in grids.load(name).configs if c.hash not in wanted]
        assert named({"config": config.to_dict()} for config in runs) == {}, name
    constant = [c for c in grids.load("laptop-schedule").configs if c.schedule == "constant" and not c.warmup]
    assert constant and {c.n_train for c in constant} == {1_024}


def test_rows_of_another_schedule_or_memory_are_of_no_configuration():
    made = rows(8.0)[:4]
    for row, change in zip(
        made, ({"schedule": "cosine"}, {"beta2_batch": 16}, {"warmup": 0.05}, {"rank": 5}), strict=True
    ):
        row["config"] = row["config"] | change
    assert named(made) == {}
