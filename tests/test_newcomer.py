"""The README's steps work as they stand, and are the whole way from a block to a file for another runtime."""

import newcomer
import pytest
from pages import blocks


@pytest.mark.timeout(10 * newcomer.LIMIT)
def test_whoever_follows_the_readme_arrives(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    taken = newcomer.walk(tmp_path)
    assert sum(seconds for _, seconds in taken) < 5 * newcomer.LIMIT, "a hang guard: other tests run beside it"
    assert len(taken) >= 14
    said = capsys.readouterr().out
    for word in ("engine", "small.onnx", "replaced"):
        assert word in said, word
    assert (tmp_path / "small.onnx").stat().st_size > 1e6
    assert (tmp_path / "runs" / "a" / "model.safetensors").exists()


def test_the_readme_shows_each_part_of_the_way():
    text = newcomer.README.read_text()
    steps = [block for _, language, block in blocks(text) if language == "python"]
    for words in ("MGICBlock(", "timm.create_model(", "mgic.accelerate(", "convert(", "export("):
        assert any(words in step for step in steps), words
