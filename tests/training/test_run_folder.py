import dataclasses
import json
import shutil
from types import SimpleNamespace

import pytest

from linscale.config import ConfigError
from linscale.training import run_folder

CORPUS = SimpleNamespace(fingerprint="f1", bytes_per_token=1.0, tokenizer=SimpleNamespace(vocab_size=257))


@pytest.fixture
def config(plain, tmp_path):
    return plain(name="a", output=str(tmp_path / "runs"))


def change(config, section, **fields):
    return dataclasses.replace(config, **{section: dataclasses.replace(getattr(config, section), **fields)})


def test_claim_writes_the_contract(config):
    run_folder.check(config)
    run_folder.claim(config, CORPUS)
    content = json.loads((run_folder.of(config) / "config.json").read_text())
    assert set(content) == {
        "linscale",
        "name",
        "config",
        "parameters",
        "data",
        "flops_per_token",
        "accounting",
        "milestones",
    }
    assert content["config"] == dataclasses.asdict(config)
    assert content["data"] == {"fingerprint": "f1", "bytes_per_token": 1.0, "tokenizer": "bytes", "vocab_size": 257}
    assert content["parameters"]["total"] > content["parameters"]["nonembedding"] > 0


def test_another_config_is_named_with_both_values(config):
    run_folder.check(config)
    run_folder.claim(config, CORPUS)
    with pytest.raises(ConfigError, match=r"config.train.batch was 8 there and is 16 now"):
        run_folder.check(change(config, "train", batch=16))
    with pytest.raises(ConfigError, match=r"config.seed was 0 there and is 1 now"):
        run_folder.check(dataclasses.replace(config, seed=1))


def test_a_field_younger_than_the_run_had_its_default_there(config):
    run_folder.check(config)
    run_folder.claim(config, CORPUS)
    path = run_folder.of(config) / "config.json"
    content = json.loads(path.read_text())
    del content["config"]["optimizer"]["theta_share"]
    path.write_text(json.dumps(content))
    run_folder.check(config)
    with pytest.raises(ConfigError, match=r"config.optimizer.theta_share was 1.0 there and is 0.5 now"):
        run_folder.check(change(config, "optimizer", theta_share=0.5))


def test_fields_that_change_no_result_may_change(config):
    run_folder.check(config)
    run_folder.claim(config, CORPUS)
    changed = change(change(config, "train", checkpoint_every=3, checkpoint_keep=9), "data", workers=2, cache="x")
    run_folder.check(change(changed, "log", tensorboard=False))


def test_other_data_are_refused(config):
    run_folder.check(config)
    run_folder.claim(config, CORPUS)
    with pytest.raises(ConfigError, match="fingerprint f1, but the data now have f2"):
        run_folder.claim(config, SimpleNamespace(**{**vars(CORPUS), "fingerprint": "f2"}))


def test_a_foreign_folder_is_left_alone(config):
    folder = run_folder.of(config)
    folder.mkdir(parents=True)
    (folder / "thesis.tex").write_text("years of work")
    with pytest.raises(ConfigError, match=r"thesis\.tex but no config\.json"):
        run_folder.check(config)
    assert [entry.name for entry in folder.iterdir()] == ["thesis.tex"]


def test_damaged_config_json(config):
    folder = run_folder.of(config)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text('{"config": ')
    with pytest.raises(ConfigError, match=r"config\.json cannot be read"):
        run_folder.check(config)


def test_output_that_cannot_be_written(config, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"config\.output is .* cannot be written \(Not a directory\)"):
        run_folder.check(dataclasses.replace(config, output=str(tmp_path / "file" / "runs")))
    with pytest.raises(ConfigError, match="cannot be written"):
        run_folder.check(dataclasses.replace(config, output="/proc/linscale-runs"))


def test_a_disk_too_small_for_the_checkpoints(config, monkeypatch):
    run_folder.check(config)
    run_folder.check_space([config])
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(ConfigError, match=r"0\.000 GB free, and the checkpoints need 0\.00\d GB"):
        run_folder.check_space([config])


def test_write_json_replaces_whole(tmp_path):
    path = tmp_path / "x.json"
    run_folder.write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        run_folder.write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1}
