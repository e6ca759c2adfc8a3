import pytest

from linscale.config import ARCHITECTURES, ConfigError
from linscale.models.transformer import layer_indices
from linscale.scaling.flops import count_parameters
from linscale.training import recipes


def test_overrides_keep_their_types(make):
    config = make("tnl", **{"train.steps": 7, "optimizer.learning_rate": 1, "log.tensorboard": "true", "name": "x"})
    assert config.train.steps == 7 and config.optimizer.learning_rate == 1.0 and config.log.tensorboard is True
    assert type(config.optimizer.learning_rate) is float and config.name == "x" and config.model.arch == "tnl"


def test_both_spellings_of_an_override():
    argv = ["--config.train.steps=5", "--config.name", "a=b"]
    assert recipes.split(argv, "train") == [("train.steps", "5"), ("name", "a=b")]


@pytest.mark.parametrize(
    "field, value, message",
    [
        ("train.stepz", "5", r"config\.train\.stepz is not a field; the nearest is config\.train\.steps\."),
        ("trian", "5", r"config\.trian is not a field; the nearest is"),
        ("train", "{}", r"config\.train is not a field"),
        ("train.steps", "many", r"config\.train\.steps is 'many'; it must be a whole number\."),
        ("train.steps", "1.5", r"config\.train\.steps is '1\.5'; it must be a whole number\."),
        ("optimizer.learning_rate", "fast", r"config\.optimizer\.learning_rate is 'fast'; it must be a number\."),
        ("log.tensorboard", "maybe", r"config\.log\.tensorboard is 'maybe'; it must be true or false\."),
        ("model.heads", "3", r"config\.model\.heads is 3, which does not divide config\.model\.width 32"),
        ("model.arch", "rwkv", r"config\.model\.arch is 'rwkv'; it must be one of"),
        ("train.accumulation", "3", r"config\.train\.accumulation is 3, which does not divide config\.train\.batch 4"),
        ("optimizer.eps", "nan", r"config\.optimizer\.eps is nan; it must be at least 0"),
        ("name", "../x", r"config\.name is '\.\./x'; it must be letters"),
    ],
)
def test_bad_values_are_one_sentence(make, field, value, message):
    with pytest.raises(ConfigError, match=message) as caught:
        make("tnl", **{field: value})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--steps=5"], r"'--steps=5' is not an option of linscale train; see linscale train --help"),
        (["5"], r"'5' is not an option"),
        (["--config.train.steps"], r"--config\.train\.steps has no value"),
        (["--config.train.steps", "--config.seed=1"], r"--config\.train\.steps has no value"),
    ],
)
def test_bad_command_lines(argv, message):
    with pytest.raises(ConfigError, match=message):
        recipes.split(argv, "train")


def test_bad_recipes(tmp_path, recipe):
    for name, text, message in (
        ("no_rungs.py", "def get_config(rung): pass", "does not define RUNGS"),
        ("typo.py", "RUNGS = ('a',)\nimport nonsense_module", "fails with ModuleNotFoundError"),
        ("syntax.py", "RUNGS = (", "fails with SyntaxError"),
        (
            "field.py",
            "from linscale.config import base\nRUNGS = ('a',)\ndef get_config(r):\n c = base(); c.train.stepz = 1",
            "fails with AttributeError",
        ),
        (
            "kind.py",
            "from linscale.config import base\nRUNGS = ('a',)\ndef get_config(r):\n c = base(); c.train.steps = 'x'",
            "fails with TypeError",
        ),
    ):
        (tmp_path / name).write_text(text)
        with pytest.raises(ConfigError, match=message):
            recipes.load_run(f"{tmp_path / name}:a", [])
    for flag, message in (
        (f"{recipe}:tln", "'tln' is not a rung of the recipe; nearest is tnl"),
        (str(recipe), "names no rung; write .*:RUNG with one of llama, tnl"),
        (
            f"{tmp_path}/absent.py:a",
            "does not exist; shipped recipes are configs/books.py, configs/demo.py, configs/ladder.py",
        ),
        (f"{tmp_path}:a", "does not exist"),
    ):
        with pytest.raises(ConfigError, match=message):
            recipes.load_run(flag, [])


def test_shipped_recipes_are_found_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = recipes.load_run("configs/ladder.py:hgrn2-1b", [("data.path", "x.txt")])
    assert (config.model.layers, config.model.width, config.model.heads, config.model.ffn) == (32, 1536, 12, 4096)
    assert config.model.remat == "full" and config.steps == 76_294 and config.tokens_per_step == 3_932_160
    assert config.optimizer.learning_rate == 3e-4 and config.optimizer.schedule == "constant"


def test_the_paper_ladder_has_all_models():
    configs = recipes.load_ladder("configs/ladder.py", [("data.path", "x.txt")])
    names = [config.name for config in configs]
    assert len(set(names)) == 5 * 6 + 2 * 4 and {"llama-70m", "cosformer2-1b-d2048", "hybrid-7b"} <= set(names)


def test_the_ladder_on_books_spans_two_and_a_half_decades_of_each_architecture():
    configs = recipes.load_ladder("configs/books.py", [("data.path", "x.txt")])
    for arch in ARCHITECTURES:
        sizes = [count_parameters(c.model).nonembedding for c in configs if c.model.arch == arch]
        assert len(sizes) == 7 and sizes == sorted(sizes) and sizes[-1] > 350 * sizes[0]
        kinds = {len(layer_indices(c.model)) for c in configs if c.model.arch == arch}
        assert kinds == {2 if arch == "hybrid" else 1}


def test_a_ladder_can_be_narrowed_and_must_have_distinct_runs(recipe, options):
    overrides = recipes.split(options, "ladder")
    assert [c.name for c in recipes.load_ladder(str(recipe), overrides, "*l*a*")] == ["llama"]
    with pytest.raises(ConfigError, match="--only=x matches no rung"):
        recipes.load_ladder(str(recipe), overrides, "x")
    with pytest.raises(ConfigError, match=r"share a config\.name"):
        recipes.load_ladder(str(recipe), [*overrides, ("name", "same")])
    with pytest.raises(ConfigError, match="names one rung"):
        recipes.load_ladder(f"{recipe}:tnl", overrides)
