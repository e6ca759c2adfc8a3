import pytest
from small_models import MODELS, make_run


@pytest.fixture
def new_run(tmp_path):
    return lambda name, model=None, **options: make_run(tmp_path / name, model or MODELS[name], **options)
