"""What the tests of the training scripts share: corpora and a pretrained base."""

from pathlib import Path

import pytest

from tests.trainer.runs import ON_DEVICE, SHAPE_FLAGS, call, write_corpora


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with small corpora, their tokens, and a model in `pretrain/`."""
    home = tmp_path_factory.mktemp("training")
    write_corpora(home)
    flags = f"{SHAPE_FLAGS} {ON_DEVICE} --data_path {home}/text.jsonl --save_dir {home}"
    flags += f" --eval_data_path {home}/text.jsonl --max_seq_len 32 --batch_size 8"
    flags += " --epochs 3 --learning_rate 1e-2"
    assert call("pretrain", flags, home, keeps_state=False) == 0
    return home
