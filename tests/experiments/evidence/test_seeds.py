"""More seeds: which learning rates go on, and that the file says exactly these runs."""

import tomllib
from dataclasses import replace

import pytest

from experiments import grids, rows
from experiments.configs import RunConfig, RunError
from experiments.critical import efficiency, overhead
from experiments.evidence import seeds
from experiments.evidence.measured import measured, target_after
from tests.experiments.evidence import synthetic

RATES = (5e-4, 7e-4, 1e-3, 1.4e-3, 2e-3)


def swept(best=1e-3, **more):
    """Runs at five learning rates, the slower the further from the best."""
    made = []
    for row in synthetic.rows(**more):
        if row["config"]["lr"] == 1e-3:
            for lr in RATES:
                slow = 1 + abs(RATES.index(lr) - RATES.index(best))
                config = RunConfig.of(row["config"] | {"lr": lr})
                late = 0.05 * (slow - 1)
                slower = [e | {"loss": e["loss"] + late * (e["step"] > 0)} for e in row["validation"]]
                made.append(row | {"hash": config.hash, "config": config.to_dict(), "validation": slower})
    return made


def again(row, lr, later):
    """The same run at another rate, so much further from the loss."""
    config = RunConfig.of(row["config"] | {"lr": lr})
    losses = [e | {"loss": e["loss"] + later * (e["step"] > 0)} for e in row["validation"]]
    return row | {"hash": config.hash, "config": config.to_dict(), "validation": losses}


def censored(part):
    found = measured(part, 1_024).examples
    return dict(zip(found.batches.astype(int), found.censored, strict=True))


@pytest.mark.parametrize(
    ("best", "wanted"),
    [(1e-3, (7e-4, 1e-3, 1.4e-3)), (5e-4, (5e-4, 7e-4, 1e-3)), (2e-3, (1e-3, 1.4e-3, 2e-3))],
)
def test_the_best_rate_and_its_neighbours_go_on_at_every_batch_size(best, wanted):
    part = swept(best)
    found = seeds.kept(measured(part, 1_024))
    assert found == dict.fromkeys(synthetic.BATCHES, wanted)


def test_a_rate_that_only_some_seeds_have_does_not_go_on():
    part = [r for r in swept() if r["config"]["lr"] != 1.4e-3 or r["config"]["seed"] == 0]
    assert seeds.kept(measured(part, 1_024))[8] == (7e-4, 1e-3, 2e-3)


def test_new_runs_differ_from_the_old_in_seeds_and_rates_alone():
    part = swept()
    new = seeds.more(part, (2, 3))
    assert len(new) == 8 * 3 * 2 and {(c.seed, c.data_seed) for c in new} == {(2, 2), (3, 3)}
    assert {c.batch_size for c in new if c.gns_every} == {4}
    old = {RunConfig.of(r["config"] | {"data_seed": 5, "seed": 5}).hash for r in part}
    assert {RunConfig.of(c.to_dict() | {"data_seed": 5, "seed": 5}).hash for c in new} <= old


def test_the_file_says_exactly_these_runs(tmp_path, capsys):
    noisy = swept(dials={"label_noise": 0.2}, n=1)
    rows.write(tmp_path / "some.jsonl.gz", swept(dials={"label_noise": 0.0}) + noisy)
    out = tmp_path / "some-seeds.toml"
    seeds.main(["some", "--folder", str(tmp_path), "--out", str(out), "--seeds", "7"])
    assert str(out) in capsys.readouterr().out
    preset = grids.load(out)
    assert len(preset.configs) == 2 * 8 * 3 and {c.seed for c in preset.configs} == {7}
    assert {c.hash for c in preset.configs} == {
        c.hash for part in (swept(dials={"label_noise": 0.0}), noisy) for c in seeds.more(part, (7,))
    }
    assert preset.series == ("dials.label_noise",)
    assert tomllib.loads(out.read_text())["defaults"]["n_train"] == 2_048


def test_an_edge_is_extended_by_one_rate_where_runs_arrived(tmp_path):
    upper, lower = swept(2e-3), swept(5e-4)
    found = seeds.beyond(upper, upper)
    arrived = [b for b in synthetic.BATCHES if not censored(upper)[b]]
    assert {c.batch_size for c in found} == set(arrived) != set(synthetic.BATCHES)
    assert {c.lr for c in found} == {2.83e-3} and {(c.seed, c.data_seed) for c in found} == {(0, 0), (1, 0)}
    assert {c.lr for c in seeds.beyond(lower, lower)} == {3.54e-4}
    # one step on: what was extended stays in the preset, and goes on where it is the best again
    more = [again(row, 2.83e-3, 0.02) for row in upper if row["config"]["lr"] == 2e-3]
    assert {c.lr for c in seeds.beyond(upper + more, upper)} == {2.83e-3}
    more = [again(row, 2.83e-3, -0.02) for row in upper if row["config"]["lr"] == 2e-3]
    further = seeds.beyond(upper + more, upper)
    assert {(c.batch_size, c.lr) for c in further if c.batch_size == 8} == {(8, 2.83e-3), (8, 4e-3)}
    new = seeds.more(seeds.of_the_seeds(upper + more, upper), (2,))
    assert {c.lr for c in new if c.batch_size == 8} == {1.4e-3, 2e-3, 2.83e-3}
    assert seeds.beyond(swept(), swept()) == []
    rows.write(tmp_path / "some.jsonl.gz", upper)
    seeds.main(["some", "--edges", "--folder", str(tmp_path), "--out", str(tmp_path / "more.toml")])
    preset = grids.load(tmp_path / "more.toml")
    assert {c.hash for c in preset.configs} == {c.hash for c in found} and "beyond the grid" in preset.title


def other_seeds(own, rates):
    """The same results of seeds 2 and 3, on other data."""
    return [
        row | {"hash": c.hash, "config": c.to_dict()}
        for row in own
        if row["config"]["lr"] in rates
        for c in [RunConfig.of(row["config"] | {"seed": row["config"]["seed"] + 2, "data_seed": 2})]
    ]


def test_an_edge_of_all_seeds_together_is_extended_for_all_of_them(tmp_path):
    """Seeds 2 and 3 have three of the five rates, and the best of all is the last that they have."""
    own = swept(1.4e-3)
    rows.write(tmp_path / "some.jsonl.gz", own)
    rows.write(tmp_path / "some-seeds.jsonl.gz", other_seeds(own, RATES[1:4]))
    out = tmp_path / "new.toml"
    with pytest.raises(SystemExit):  # two of the seeds have gone beyond it, and found worse
        seeds.main(["some", "--together", "--folder", str(tmp_path), "--out", str(out)])
    own = swept(2e-3)
    rows.write(tmp_path / "some.jsonl.gz", own)
    rows.write(tmp_path / "some-seeds.jsonl.gz", other_seeds(own, RATES[2:]))
    seeds.main(["some", "--together", "--folder", str(tmp_path), "--out", str(out)])
    configs = grids.load(out).configs
    assert {(c.seed, c.data_seed) for c in configs} == {(0, 0), (1, 0), (2, 2), (3, 2)}
    assert {c.lr for c in configs} == {2.83e-3} and "all seeds" in grids.load(out).title
    # once its own runs are there, the preset is the same, whatever came of them
    batches = {c.batch_size for c in configs}
    last = [row for row in own + other_seeds(own, RATES[2:]) if row["config"]["lr"] == 2e-3]
    more = [again(row, 2.83e-3, 0.1) for row in last if row["config"]["batch_size"] in batches]
    rows.write(tmp_path / "some-together.jsonl.gz", more)
    before = out.read_text()
    seeds.main(["some", "--together", "--folder", str(tmp_path), "--out", str(out)])
    assert out.read_text() == before


def test_what_other_seeds_did_does_not_change_a_preset(tmp_path):
    """Run again once its own runs are committed: the same preset, for the seeds of the grid."""
    own = swept(2e-3)
    rows.write(tmp_path / "some.jsonl.gz", own)
    later = other_seeds(own, RATES[2:])
    for kind in ([], ["--edges"]):
        made = []
        for there in ([], later):
            rows.write(tmp_path / "some-seeds.jsonl.gz", there)
            seeds.main(["some", *kind, "--folder", str(tmp_path), "--out", str(tmp_path / "new.toml")])
            made.append((tmp_path / "new.toml").read_text())
        assert made[0] == made[1]


def test_without_an_edge_there_is_nothing_to_extend(tmp_path, capsys):
    rows.write(tmp_path / "some.jsonl.gz", swept())
    with pytest.raises(SystemExit, match="2"):
        seeds.main(["some", "--edges", "--folder", str(tmp_path)])
    assert "no batch that arrived has its best learning rate at an edge" in capsys.readouterr().err


def test_what_a_preset_of_seeds_cannot_say_is_refused():
    part = seeds.more(swept(), (2,))
    warm = RunConfig.of(part[0].to_dict() | {"weight_decay": 0.1})
    with pytest.raises(RunError, match="differ in more than a preset of seeds can say"):
        seeds.written("some", {"reference": [*part[1:], warm]})


def test_what_configurations_share_is_no_name_of_a_curve():
    """Two of the larger base: `base` is a default, and their noise alone tells one curve from another."""
    part = [
        replace(config, base="math-1m", dials={"label_noise": 0.0}) for config in seeds.more(swept(), (2,))
    ]
    noisy = [replace(config, dials={"label_noise": 0.5}) for config in part]
    text = seeds.written("some", {"math-1m": part, "math-1m, noise 0.5": noisy})
    preset = grids.parsed("some", tomllib.loads(text), "some.toml")
    assert preset.series == ("dials.label_noise",) and text.count('base = "math-1m"') == 1
    assert {config.hash for config in preset.configs} == {config.hash for config in [*part, *noisy]}


@pytest.mark.parametrize(
    ("of", "said"), [(None, "run and --collect some first"), ("sgdm", "no rows of a prereg")]
)
def test_without_rows_it_says_what_to_do(tmp_path, capsys, of, said):
    if of:
        rows.write(
            tmp_path / "some.jsonl.gz", [r | {"config": r["config"] | {"optimizer": of}} for r in swept()]
        )
    with pytest.raises(SystemExit, match="2"):
        seeds.main(["some", "--folder", str(tmp_path)])
    assert said in capsys.readouterr().err


def test_halving_keeps_what_was_found_and_calls_no_edge():
    """Four seeds, the last two at three of five rates: the same B_crit as with all, none at an edge."""
    part = swept(seeds=4, b_crit=12.0)
    half = [r for r in part if r["config"]["seed"] < 2 or r["config"]["lr"] in (7e-4, 1e-3, 1.4e-3)]
    target = target_after(part, 512)
    whole, left = efficiency(part, target), efficiency(half, target)
    assert list(left.log_examples) == list(whole.log_examples) and not left.edges and not whole.edges
    assert overhead(left).value == overhead(whole).value
    assert whole.censored.any() and set(whole.rates) == {1e-3}  # also where none arrives
    # the best of those that went on is their last: that one beyond it was tried, and worse, is known
    border = [r for r in part if r["config"]["seed"] < 2 or r["config"]["lr"] in (5e-4, 7e-4, 1e-3)]
    assert not efficiency(border, target).edges
    assert efficiency([r for r in border if r["config"]["lr"] <= 1e-3], target).edges
    worst = [r | {"validation": r["validation"][:1]} if r["config"]["lr"] == 7e-4 else r for r in half]
    assert not efficiency(worst, target).edges
    narrow = [r for r in half if r["config"]["lr"] in (1e-3, 1.4e-3)]
    assert efficiency(narrow, target).edges == synthetic.BATCHES
