"""What the tests of the training scripts share: corpora and a pretrained base."""

from pathlib import Path

import pytest

from tests.trainer.runs import CPU, SHAPE_FLAGS, call, write_corpora


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with small corpora, their tokens, and a model in `pretrain/`."""
    home = tmp_path_factory.mktemp("training")
    write_corpora(home)
    flags = f"{SHAPE_FLAGS} {CPU} --data_path {home}/text.jsonl --eval_data_path {home}/text.jsonl"
    flags += f" --save_dir {home} --max_seq_len 32 --batch_size 8 --epochs 3 --learning_rate 1e-2"
    assert call("pretrain", flags, home) == 0
    return home
