import pytest


@pytest.fixture
def data(tmp_path) -> list[str]:
    return ["--train_data_dir", str(tmp_path)]
