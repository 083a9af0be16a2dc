"""Ten recoveries of the first edition, recomputed from `nll.parquet`."""

import numpy as np
import pandas as pd
import pytest

from evaluation.study.settings import RESULTS_DIR

CELLS = pd.read_csv(RESULTS_DIR / "edition1.csv", dtype={"learning_rate": str})
CELLS = CELLS.query("kind == 'cell'").set_index(["base", "cell"])
NLL = pd.read_parquet(RESULTS_DIR / "nll.parquet", filters=[("edition", "==", 1)])
NATS = NLL.query("part == '' and set == 'general'").set_index("id").nats
FULL = {"xs": "fft-lr2e-3", "s": "fft-lr5e-4"}  # full fine-tuning at its tuned rate, by size
PLACES = """xs-plain42 minimind@1e-4/one_epoch
xs-plain42 minimind@1e-2
xs-plain42 all_r8@3e-3
xs-plain42 fft_frozen_vocabulary@2e-3
xs-plain42 all_r8_vocabulary@2e-3
xs-plain43 all_r8@3e-3
xs-short_wrapped42 all_r8@3e-3
s-short42 all_r8@3e-3
s-whole42 minimind@1e-4
s-whole42 all_r8_vocabulary@2e-3"""


@pytest.mark.parametrize("place", PLACES.splitlines())
def test_recovery(place: str) -> None:
    """R = (L_base - L_arm) / (L_base - L_FFT). L: mean nats of conversations of odd index."""
    base, cell = place.split()
    row = CELLS.loc[(base, cell)]
    variant = "" if row.variant == "main" else f"-{row.variant}"
    seeds = range(1, int(row.seeds) + 1)
    arm = [f"{base}-{row.arm}{variant}-lr{row.learning_rate}-s{seed}" for seed in seeds]
    full = [f"{base}-{FULL[row['size']]}-s{seed}" for seed in seeds]
    sums = {run: NATS[run][1::2].astype(float).sum() for run in (base, *arm, *full)}
    base, arm, full = (np.mean([sums[run] for run in runs]) for runs in ([base], arm, full))
    assert (base - arm) / (base - full) == pytest.approx(row.R, abs=2e-4), cell
