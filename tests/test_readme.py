"""The README's example runs as it stands there."""

import functools
import re
import shutil
import warnings
from pathlib import Path

import peft
import pytest
import torch
import transformers

import gns
from experiments.markdown import marks
from tests.gns import tiny
from tests.gns.commands.running import run

README = Path(__file__).parents[1] / "README.md"


def test_the_ten_lines_run_and_measure(capsys):
    code, _ = re.findall(r"```python\n(.*?)```", README.read_text(), re.S)
    with warnings.catch_warnings():  # peft 0.21 asks transformers 5.23 for an attribute it renamed
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`", category=FutureWarning)
        exec(compile(code, str(README), "exec"), names := {})
    said = capsys.readouterr().out
    estimate = names["monitor"].estimate()
    assert said.startswith("B_simple") and "25 steps × 8" in said
    assert estimate.coverage == 1 and estimate.n_examples == 200
    assert "56 of 56 trainable parameters measured" in said
    assert not names["monitor"].attached


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_the_trainers_lines_run(tmp_path, monkeypatch, capsys):
    _, code = re.findall(r"```python\n(.*?)```", README.read_text(), re.S)
    monkeypatch.chdir(tmp_path)
    model = peft.get_peft_model(tiny.llama(), peft.LoraConfig(r=4, target_modules="all-linear"))
    rows = [{"input_ids": row, "labels": row} for row in torch.randint(2, 99, (48, 12)).tolist()]
    options = {"per_device_train_batch_size": 2, "max_steps": 22, "report_to": "none", "use_cpu": True}
    arguments = transformers.TrainingArguments(str(tmp_path / "out"), disable_tqdm=True, **options)
    trainer = functools.partial(transformers.Trainer, model, arguments, train_dataset=rows)
    exec(code.replace("..., ", ""), {"GNSCallback": gns.GNSCallback, "Trainer": trainer})
    assert (tmp_path / "runs" / "mine" / "report.html").is_file()
    assert re.search(r"^B_simple .*22 steps × 2", capsys.readouterr().out, re.M)


def test_the_commands_run_one_after_the_other(tmp_path, monkeypatch, capsys):
    """As they stand there, but for the model, the data, and a second run to compare with."""
    monkeypatch.chdir(tmp_path)
    tiny.save_model(tmp_path / "model")
    tiny.save_jsonl(tmp_path / "train.jsonl", [{"text": text} for text in tiny.sentences(400)])
    (block,) = (
        found for found in re.findall(r"```sh\n(.*?)```", README.read_text(), re.S) if "gns probe" in found
    )
    commands = [line.partition("#")[0].split()[1:] for line in block.splitlines()]
    assert [each[0] for each in commands] == ["probe", "measure", "throughput", "advise", "report"]
    small = ["--max-length", "16", "--rank", "4"]  # what is given twice counts as given last
    more = {"probe": small, "measure": small, "throughput": [*small, "--largest", "2"]}
    for command in commands:
        asked = [{"PATH_OR_HUB_ID": "model"}.get(word, word) for word in command] + more.get(command[0], [])
        if command[0] == "report":
            shutil.copytree("runs/mine", "runs/other")
        code, _, err = run(capsys, *asked)
        assert code == 0, (command, err)
    assert (tmp_path / "runs" / "speed" / "throughput.json").is_file()


@pytest.mark.parametrize("target", ["demo", "test"])
def test_its_two_commands_are_targets_of_the_makefile(target):
    assert f"make {target}" in README.read_text()
    assert re.search(rf"^{target}: ", (README.parent / "Makefile").read_text(), re.M)


@pytest.mark.parametrize("page", [README, README.parent / "experiments" / "README.md"])
def test_what_it_says_of_the_evidence_is_what_the_rows_say(page):
    first, last = marks("evidence")
    part = page.read_text().partition(f"{first}\n")[2].partition(last)[0]
    evidence = README.parent / "experiments" / "results" / "evidence" / "README.md"
    answer = part.partition(" [Every number")[0]
    assert "configurations" in answer and answer in evidence.read_text()


def test_its_links_lead_somewhere():
    links = re.findall(r"\]\((?!https?:)([^)]+)\)", README.read_text())
    assert links
    for link in links:
        assert (README.parent / link).exists(), link
