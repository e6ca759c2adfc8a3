"""A cached corpus is whole or absent: full disks, killed and competing processes, damaged files."""

import errno
import os
import subprocess
import sys
import time

import numpy as np
import pytest

from linscale.config import ConfigError, Data
from linscale.data import cache, prepare

CHILD = """
import sys
from linscale.config import Data
from linscale.data import prepare
import resource
if len(sys.argv) > 3: resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]),) * 2)
print(prepare(Data(source="text", path=sys.argv[1], separator="|", cache=sys.argv[2]), log=lambda m: None).fingerprint)
"""


def data_in(folder, documents=3000) -> Data:
    if not (folder / "texts").exists():
        (folder / "texts").write_text("|".join(f"document {number}" for number in range(documents)))
    return Data(source="text", path=str(folder / "texts"), separator="|", cache=str(folder / "cache"))


def child(folder, *more):
    command = [sys.executable, "-c", CHILD, str(folder / "texts"), str(folder / "cache"), *map(str, more)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize("name", ["train.tokens", "heldout.tokens", "train.starts", "manifest.json"])
@pytest.mark.parametrize("damage", ["truncated", "removed"])
def test_damage_is_noticed_told_and_repaired(tmp_path, name, damage):
    corpus = prepare(data_in(tmp_path), log=lambda message: None)
    tokens = np.array(corpus.train.tokens)
    file = os.path.join(corpus.folder, name)
    if damage == "removed":
        os.remove(file)
    else:
        os.truncate(file, os.path.getsize(file) - 2)
    messages = []
    again = prepare(data_in(tmp_path), log=messages.append)
    assert "is damaged" in messages[0] and "building it again" in messages[0]
    assert np.array_equal(again.train.tokens, tokens)
    assert os.listdir(tmp_path / "cache") == [os.path.basename(corpus.folder)]


def test_a_full_disk_is_one_sentence_and_leaves_nothing(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(ConfigError, match=r"^config.data.cache is .* No space left on device; free some space"):
            prepare(data_in(tmp_path), log=lambda message: None)
    assert os.listdir(tmp_path / "cache") == []
    assert prepare(data_in(tmp_path), log=lambda message: None).train.documents > 2000


def test_a_write_that_fails_half_way(tmp_path):
    """The same by a real limit: no file larger than 10,000 bytes."""
    data_in(tmp_path)
    out, err = child(tmp_path, 10_000).communicate(timeout=60)
    assert out == "" and "linscale.config.ConfigError: config.data.cache is" in err.splitlines()[-1]
    assert os.listdir(tmp_path / "cache") == []


def test_a_cache_that_cannot_be_a_folder(tmp_path):
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(ConfigError, match=r"config.data.cache is .*cannot be written: .*choose another folder"):
        prepare(data_in(tmp_path), log=lambda message: None)


def test_several_processes_at_once(tmp_path):
    data = data_in(tmp_path, 100_000)
    processes = [child(tmp_path) for _ in range(3)]
    results = [process.communicate(timeout=100) for process in processes]
    corpus = prepare(data, log=pytest.fail)
    assert [out.strip() for out, _ in results] == [corpus.fingerprint] * 3, results
    assert os.listdir(tmp_path / "cache") == [f"corpus-{corpus.fingerprint}"]


def test_another_process_finishes_first(tmp_path):
    messages = []

    def log(message):
        messages.append(message)
        if len(messages) == 1:  # in the midst of our building
            prepare(data_in(tmp_path), log=lambda message: None)

    corpus = prepare(data_in(tmp_path), log=log)
    assert len(os.listdir(tmp_path / "cache")) == 1 and corpus.train.documents > 2000


def test_killed_while_building(tmp_path):
    data_in(tmp_path, 400_000)
    for delay in (0.15, 0.25, 0.35):
        process = child(tmp_path)
        time.sleep(delay)
        process.kill()
        process.communicate()
        for folder in (tmp_path / "cache").glob("corpus-*"):
            assert cache.load_manifest(str(folder), folder.name.removeprefix("corpus-"), pytest.fail)
    corpus = prepare(data_in(tmp_path), log=lambda message: None)
    assert corpus.train.documents + corpus.heldout.documents > 390_000


def test_old_drafts_are_swept_and_young_ones_are_not(tmp_path):
    for name, age in {".building-old": 2 * 86_400, ".building-young": 60}.items():
        folder = tmp_path / "cache" / name
        folder.mkdir(parents=True)
        (folder / "train.tokens").write_text("x")
        for path in (folder / "train.tokens", folder):
            os.utime(path, (time.time() - age,) * 2)
    prepare(data_in(tmp_path), log=lambda message: None)
    assert not (tmp_path / "cache" / ".building-old").exists() and (tmp_path / "cache" / ".building-young").exists()


def test_the_folder_is_chosen_by_config_then_environment(tmp_path, monkeypatch):
    import dataclasses

    monkeypatch.setenv("LINSCALE_CACHE", str(tmp_path / "environment"))
    by_config = prepare(data_in(tmp_path), log=lambda message: None)
    by_environment = prepare(dataclasses.replace(data_in(tmp_path), cache=""), log=lambda message: None)
    assert os.path.dirname(by_config.folder) == str(tmp_path / "cache")
    assert os.path.dirname(by_environment.folder) == str(tmp_path / "environment")
    assert by_config.fingerprint == by_environment.fingerprint
