import pytest
from synthetic_ladder import write_ladder


@pytest.fixture(scope="session")
def ladder_folder(tmp_path_factory):
    return write_ladder(tmp_path_factory.mktemp("ladder") / "demo")
