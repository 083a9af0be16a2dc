"""20 float32 steps of the three stages, straight and resumed, are those of edition 1's code.

That code's weights were equal to the bit with its model; a model that adds up in another order
gives other last bits.
"""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.trainer.runs import SHAPE_FLAGS, WEIGHTS, at_step, call, rows_of, terminate

GOLDENS = json.loads((Path(__file__).parents[1] / "goldens/trainer.json").read_text())["runs"]
COMMON = "--device cpu --dtype float32 --log_interval 3 --eval_interval 7 --save_interval 4 "
COMMON += "--max_seq_len 64 --max_steps 20 --warmup_ratio 0.1"
TUNING = "--from_weight {out}/pretrain --data_path {home}/sft.jsonl --eval_data_path "
TUNING += "{home}/valid.jsonl"
FLAGS = {
    "pretrain": f"{SHAPE_FLAGS} --data_path {{home}}/text.jsonl --eval_data_path "
    "{home}/text.jsonl --batch_size 4 --accumulation_steps 2",
    "full_sft": f"{TUNING} --batch_size 8 --weight_decay 0.1",
    "lora": f"{TUNING} --batch_size 4 --accumulation_steps 2 --lora_dropout 0.2 "
    "--loraplus_lr_ratio 4 --train_tokens <|im_end|> --modules_to_save norms",
}


@pytest.mark.parametrize("way", ["straight", "resumed"])
def test_twenty_steps(home: Path, tmp_path: Path, way: str) -> None:
    for stage, golden in GOLDENS.items():
        flags = f"{COMMON} {FLAGS[stage].format(home=home, out=tmp_path)} --save_dir {tmp_path}"
        if way == "resumed":
            assert call(stage, flags, home, at_step(10, terminate)) == 130
            flags += " --from_resume"
        assert call(stage, flags, home) == 0
        rows = rows_of(tmp_path / stage)
        assert len(rows) == len(golden["rows"])
        for row, expected in zip(rows, golden["rows"], strict=True):
            assert row == pytest.approx(expected, rel=1e-4)
        tensors = load_file(tmp_path / stage / WEIGHTS[stage])
        norms = {name: tensor.double().norm().item() for name, tensor in tensors.items()}
        assert norms == pytest.approx(golden["norms"], rel=1e-4)
