import dataclasses

import pytest
import safetensors.torch

from experiments.bases import BASES
from experiments.bases.__main__ import main
from experiments.bases.training import Run
from gns import corpus
from tests.experiments.bases.tiny import TINY, assert_same_bits, start


def test_interrupted_command_goes_on(documents, tmp_path, monkeypatch):
    advance = Run.advance

    def stop_at_third(run):
        if run.step == 2:
            run.save(tmp_path / "cache" / "tiny.safetensors")
            raise KeyboardInterrupt
        return advance(run)

    monkeypatch.setitem(BASES, "tiny", dataclasses.replace(TINY, steps=4))
    monkeypatch.setattr(corpus, "documents", lambda part: documents)
    arguments = ["tiny", "--out", str(tmp_path / "out"), "--cache", str(tmp_path / "cache")]
    monkeypatch.setattr(Run, "advance", stop_at_third)
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 130
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(Run, "advance", advance)
    main(arguments)
    resumed = safetensors.torch.load_file(tmp_path / "out" / "model.safetensors")
    main(["tiny", "--out", str(tmp_path / "again"), "--cache", str(tmp_path / "other")])
    assert_same_bits(safetensors.torch.load_file(tmp_path / "again" / "model.safetensors"), resumed)
    assert "several sittings" in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")


def test_command_line_names_the_known_sizes(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["70b"])
    assert stopped.value.code == 2
    assert "1m" in capsys.readouterr().err


def test_command_line_refuses_a_foreign_checkpoint_in_one_line(
    documents, tmp_path, monkeypatch, capsys, tokenizer, stream
):
    start(tokenizer, stream).save(tmp_path / "tiny.safetensors")
    monkeypatch.setitem(BASES, "tiny", dataclasses.replace(TINY, seed=1))
    monkeypatch.setattr(corpus, "documents", lambda part: documents)
    with pytest.raises(SystemExit) as stopped:
        main(["tiny", "--out", str(tmp_path / "out"), "--cache", str(tmp_path)])
    assert stopped.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "out").exists()
