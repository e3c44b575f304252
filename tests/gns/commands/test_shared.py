"""What the commands share."""

import pytest
import torch

from gns.commands.shared import named_layers, threads_as_in_a_run
from gns.finetuning.preparation import BASE, HELD_OUT, FinetuneConfig


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("all-linear", "all-linear"),
        (" all-linear ,", "all-linear"),
        ("q_proj, v_proj", ("q_proj", "v_proj")),
        (" , ", ()),
    ],
)
def test_layers_are_named_with_commas_between(text, names):
    assert named_layers(text) == names


@pytest.mark.parametrize(("model", "inside"), [(BASE, 1), ("other", 2)])
def test_the_shipped_model_alone_runs_on_one_thread(model, inside, request):
    before = torch.get_num_threads()
    request.addfinalizer(lambda: torch.set_num_threads(before))
    torch.set_num_threads(2)
    with threads_as_in_a_run(FinetuneConfig(model, HELD_OUT)):
        assert torch.get_num_threads() == inside
    assert torch.get_num_threads() == 2
