import json

import pytest

from linscale.config import base, resolve

ROWS = {
    "piqa.mosaic.jsonl": [
        {"query": "Question: How do I open a jar?\n", "choices": ["Twist the lid.", "Hit it with a fish."], "gold": 0},
        {"query": "Question: Where does milk go?\n", "choices": ["Under the bed.", "In the fridge."], "gold": 1},
        {"query": "Question: How to dry a cup?\n", "choices": ["With a towel.", "With a hose and a rake."], "gold": 0},
    ],
    "lambada_test.jsonl": [
        {"text": "She gave the dog a bone, and it was the happiest dog"},
        {"text": "He ran and ran until he could not run any more, yet he ran"},
    ],
    "wikitext-2/wikitext2_test_docs.jsonl": [
        {"page": " \n = Cats = \n \n A cat is a small animal @-@ like thing . \n"},
        {"page": " \n = Rain = \n \n It rained , and it rained 1 @,@ 000 times . \n"},
    ],
    "winogrande.mosaic.jsonl": [
        {
            "context_options": ["The cup beat the jug so the cup", "The cup beat the jug so the jug"],
            "continuation": "won.",
            "gold": 0,
        },
        {
            "context_options": ["Ann hid from Eve as Ann", "Ann hid from Eve as Eve"],
            "continuation": "was shy.",
            "gold": 0,
        },
    ],
}


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory):
    """A few rows of some tasks, as files of a --data-dir."""
    folder = tmp_path_factory.mktemp("data")
    for name, rows in ROWS.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """Folder of a ladder with one finished run: two checkpoints of a tiny TNL on bytes."""
    from linscale.training import loop

    folder = tmp_path_factory.mktemp("ladder")
    text = folder / "text"
    text.mkdir()
    for n in range(40):
        words = " ".join(str((n * 37 + i * i) % 101) for i in range(60))
        (text / f"{n:02}.txt").write_text(f"Document {n}. It says: {words}.")
    config = base()
    config.name, config.output = "tnl-tiny", str(folder / "runs")
    config.model.arch, config.model.layers, config.model.width, config.model.heads = "tnl", 1, 32, 2
    config.model.ffn, config.model.vocab_size = 48, 264
    config.train.batch, config.train.sequence, config.train.steps = 2, 32, 8
    config.train.checkpoint_every, config.train.checkpoint_keep = 4, 5
    config.data.source, config.data.path, config.data.cache = "text", f"{text}/*.txt", str(folder / "cache")
    config.data.heldout_tokens, config.data.heldout_share = 1000, 0.2
    config.log.tensorboard = False
    loop.train(resolve(config))
    return folder / "runs"
